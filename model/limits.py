"""What may be asked of `generate`: checked by it, and by the command line before torch and a model are loaded."""

import math


def check_sampling(*, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed):
    """Raises a ValueError that names the first of `generate`'s arguments that is out of range, of those that need no model."""
    penalty = repetition_penalty
    check("max_new_tokens", max_new_tokens, type(max_new_tokens) is int and max_new_tokens >= 0, "an integer from 0 on")
    check("temperature", temperature, _number(temperature) and temperature >= 0, "a number from 0 on")
    check("top_k", top_k, top_k is None or (type(top_k) is int and top_k >= 1), "an integer from 1 on")
    check("top_p", top_p, top_p is None or (_number(top_p) and 0 < top_p <= 1), "a number above 0, at most 1")
    check("min_p", min_p, min_p is None or (_number(min_p) and 0 <= min_p <= 1), "a number from 0 to 1")
    check("repetition_penalty", penalty, penalty is None or (_number(penalty) and penalty > 0), "a number above 0")
    check("seed", seed, seed is None or (type(seed) is int and 0 <= seed < 2**63), "an integer from 0 to 2**63 - 1")


def check_stop(stop):
    """Raises a ValueError where these are no texts that can end a stream."""
    fits = not isinstance(stop, str) and all(isinstance(text, str) and text for text in stop)
    check("stop", stop, fits, "a list of texts that are not empty")


def check(name, value, fits, expected):
    if not fits:
        raise ValueError(f"{name} is {brief(value)}, expected {expected}")


def brief(value):
    """A value as it may stand in an error: on one line and of limited length."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _number(value):
    return type(value) in (int, float) and abs(value) < math.inf
