"""The exercises, finished: same files, same functions. The skeletons in exercises/ are made from these."""
import flash_edu  # noqa: F401  first: picks Triton's interpreter or the GPU before a chapter imports triton
