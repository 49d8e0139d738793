"""Yours to edit: one file a chapter. Open it beside its notebook, and let `flash-edu check 4` judge it."""
import flash_edu  # noqa: F401  first: picks Triton's interpreter or the GPU before a chapter imports triton
