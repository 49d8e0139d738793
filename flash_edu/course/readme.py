"""The README's table of chapters, drawn from the manifest: `python -m flash_edu.course.readme` writes it anew."""
from flash_edu.course.manifest import Chapter, Course, load_course

BEGIN = "<!-- This table is made from exercises/course.toml: python -m flash_edu.course.readme -->"
END = "<!-- end of the table -->"


def chapter_table(course: Course) -> str:
    lines = ["| | chapter | the one idea | time | exercises |", "|---|---|---|---|---|"]
    part = ""
    for chapter in course.chapters:
        lines.append(_row(chapter, new_part=chapter.part != part))
        part = chapter.part
    return "\n".join(lines)


def _row(chapter: Chapter, new_part: bool) -> str:
    part = f"**{chapter.part}**" if new_part else ""
    title = f"[{chapter.number:02d} {chapter.title}](notebooks/{chapter.notebook})"
    return f"| {part} | {title} | {chapter.idea} | {chapter.minutes} min | {len(chapter.exercises)} |"


def with_table(readme: str, course: Course) -> str:
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{chapter_table(course)}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    course = load_course()
    path = course.root / "README.md"
    path.write_text(with_table(path.read_text(encoding="utf-8"), course), encoding="utf-8")
