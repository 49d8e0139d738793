"""What an answer to chapter 00 must satisfy."""

import math

import pytest

exercise = pytest.mark.exercise("0.1")


def scale_of(answer, head_dim):
    """The answer's scale, once it is a number at all."""
    got = answer.softmax_scale(head_dim)
    assert got is not None, (
        f"softmax_scale({head_dim}) returned None.\n"
        "A function without a return statement gives None. Put `return` in front of your formula."
    )
    assert isinstance(got, float), (
        f"softmax_scale({head_dim}) = {got!r} is of type {type(got).__name__}, expected a Python float.\n"
        "head_dim is a plain Python number, and so is the answer: no tensor, no rounding to a whole number."
    )
    return got


@exercise
def test_the_toy(answer):
    """head_dim 4, the toy's, gives 0.5"""
    got = scale_of(answer, 4)
    assert math.isclose(got, 0.5, rel_tol=1e-12), (
        f"softmax_scale(4) = {got}, expected 0.5.\n"
        "The square root of 4 is 2, and the scale is 1 divided by it. It makes scores smaller, not larger."
    )


@exercise
@pytest.mark.parametrize("head_dim", [1, 2, 16, 59, 64, 80, 128, 256])
def test_any_head_dimension(answer, head_dim):
    """every other head dimension gives 1 over its square root"""
    got, right = scale_of(answer, head_dim), 1 / math.sqrt(head_dim)
    assert math.isclose(got, right, rel_tol=1e-12), (
        f"softmax_scale({head_dim}) = {got:.6g}, expected 1 / sqrt({head_dim}) = {right:.6g}.\n"
        "Does your formula use head_dim, and nothing but head_dim?"
    )


@exercise
def test_four_times_the_head_dimension(answer):
    """four times the head dimension halves the scale"""
    small, large = scale_of(answer, 9), scale_of(answer, 36)
    assert math.isclose(large, small / 2, rel_tol=1e-12), (
        f"softmax_scale(9) = {small:.6g}, softmax_scale(36) = {large:.6g}: that should be half as much.\n"
        "Four times the argument gives twice the square root. Look at what you take the root of."
    )
