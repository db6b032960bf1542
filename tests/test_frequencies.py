"""rope_tables against formulas in numpy float64 (tight) and against transformers' own functions (as far as float32 goes)."""

import math
import types

import numpy as np
import pytest
import torch
from trillama.kernels import rope_tables
from trillama.kernels.frequencies import context_length, rope_parameters, same_frequencies

pytestmark = pytest.mark.host

PHI = {
    "rope_type": "longrope", "short_factor": [1 + 0.01 * i for i in range(16)], "long_factor": [1 + 0.5 * i for i in range(16)],
    "original_max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": LLAMA3,
    "longrope": PHI,
    "longrope-factor": {**PHI, "factor": 6.0},
    "longrope-attention": {**PHI, "attention_factor": 1.5},
    "yarn": YARN,
    "yarn-betas": {**YARN, "beta_fast": 20, "beta_slow": 2},
    "yarn-exact": {**YARN, "truncate": False},
    "yarn-mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn-attention": {**YARN, "attention_factor": 0.9},
}


def formula(p, D, length, maximum):
    """(frequencies, attention factor) for a dict in transformers' dialect, with scalar loops."""
    theta, kind, factor = p.get("rope_theta", 1e4), p["rope_type"], p.get("factor")
    original, attention = p.get("original_max_position_embeddings", maximum), 1.0
    if kind == "dynamic":
        theta *= (factor * max(length, maximum) / maximum - factor + 1) ** (D / (D - 2))
    f = [theta ** (-2 * i / D) for i in range(D // 2)]
    if kind == "linear":
        f = [x / factor for x in f]
    if kind == "llama3":
        for i, x in enumerate(f):
            wavelength = 2 * math.pi / x
            smooth = (original / wavelength - p["low_freq_factor"]) / (p["high_freq_factor"] - p["low_freq_factor"])
            if wavelength > original / p["low_freq_factor"]:
                f[i] = x / factor
            elif wavelength >= original / p["high_freq_factor"]:
                f[i] = (1 - smooth) * x / factor + smooth * x
    if kind == "longrope":
        f = [x / e for x, e in zip(f, p["long_factor" if length > original else "short_factor"])]
        factor = factor or maximum / original
        attention = p.get("attention_factor") or math.sqrt(1 + math.log(factor) / math.log(original))
    if kind == "yarn":
        bounds = [
            D * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (p.get("beta_fast", 32), p.get("beta_slow", 1))
        ]
        low, high = (math.floor(bounds[0]), math.ceil(bounds[1])) if p.get("truncate", True) else bounds
        low, high = max(low, 0), min(high, D - 1)
        for i, x in enumerate(f):
            ramp = min(1, max(0, (i - low) / (high - low)))
            f[i] = x / factor * ramp + x * (1 - ramp)
        attention = 0.1 * math.log(factor) + 1
        if "mscale" in p:
            attention = (0.1 * p["mscale"] * math.log(factor) + 1) / (0.1 * p["mscale_all_dim"] * math.log(factor) + 1)
        attention = p.get("attention_factor", attention)
    return np.array(f), attention


def expected(p, D, length, maximum=1024):
    f, attention = formula(p, D, length, maximum)
    angles = np.outer(np.arange(length), f)
    return [torch.from_numpy(attention * table) for table in (np.cos(angles), np.sin(angles))]


def one_rounding(table, exact):
    """Whether every entry is within half a unit in the last place (and a hair) of the exact value."""
    ulp = torch.finfo(torch.float32).eps / 2 * exact.abs().clamp(min=2.0**-40)
    return ((table.double() - exact).abs() <= 1.01 * ulp + 1e-12).all()


@pytest.mark.parametrize("length", [1, 63, 64, 65, 300, 1024, 1025, 3000])
@pytest.mark.parametrize("name", SCALINGS)
def test_formulas(name, length):
    p = {**SCALINGS[name], "rope_theta": 5e4}
    tables = rope_tables({"rope_parameters": p, "max_position_embeddings": 1024}, 32, length)
    for table, exact in zip(tables, expected(p, 32, length)):
        assert table.dtype == torch.float32
        assert table.shape == (length, 16)
        assert one_rounding(table, exact)


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
@pytest.mark.parametrize("D", [64, 80, 96, 128])
def test_far_positions(theta, D):
    """Position 131,071, where tables made in float32 are wrong in the third digit."""
    tables = rope_tables(theta, D, 131072)
    f = theta ** -(np.arange(0, D, 2) / D)
    for p in (1, 4095, 65537, 131071):
        assert one_rounding(tables[0][p], torch.from_numpy(np.cos(p * f)))
        assert one_rounding(tables[1][p], torch.from_numpy(np.sin(p * f)))


@pytest.mark.parametrize("length", [60, 64, 65, 900, 1500])
@pytest.mark.parametrize("name", SCALINGS)
def test_transformers(name, length):
    transformers = pytest.importorskip("transformers")
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    p = {**SCALINGS[name], "rope_theta": 5e4}
    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=4, max_position_embeddings=1024, rope_theta=p["rope_theta"],
        rope_scaling={k: v for k, v in p.items() if k != "rope_theta"},
    )  # fmt: skip
    if name == "default":
        f, attention = 1 / p["rope_theta"] ** (torch.arange(0, 32, 2) / 32), 1.0
    else:
        f, attention = rope_utils.ROPE_INIT_FUNCTIONS[p["rope_type"]](config, "cpu", seq_len=length)
    angles = torch.outer(torch.arange(length).float(), f)
    for table, theirs in zip(rope_tables(config, 32, length), (angles.cos() * attention, angles.sin() * attention)):
        torch.testing.assert_close(table, theirs, rtol=0, atol=length * 3e-7)


def test_dialects():
    scaling = {k: v for k, v in PHI.items() if k not in ("rope_type", "original_max_position_embeddings")}
    common = {"max_position_embeddings": 1024, "original_max_position_embeddings": 64, "model_type": "phi3"}
    new = {**common, "rope_parameters": {**PHI, "rope_theta": 5e4}}
    dialects = [
        {**common, "rope_theta": 5e4, "rope_scaling": {**scaling, "rope_type": "longrope"}},
        {**common, "rope_theta": 5e4, "rope_scaling": {**scaling, "type": "su"}},
        {**common, "rope_theta": 5e4, "rope_scaling": {**scaling, "type": "yarn"}},  # so in the first Phi-3 files
        {**common, "rope_parameters": {**PHI, "original_max_position_embeddings": 7, "rope_theta": 5e4}},
        types.SimpleNamespace(**new),
    ]
    for length in (64, 65):
        wanted = rope_tables(new, 32, length)
        for dialect in dialects:
            for table, other in zip(rope_tables(dialect, 32, length), wanted):
                assert torch.equal(table, other)
    assert not torch.equal(rope_tables(new, 32, 64)[1], rope_tables(new, 32, 65)[1][:64])


def test_theta_and_scaling():
    scaling = {"type": "linear", "factor": 4.0}
    for table, other in zip(rope_tables(1e5, 16, 40, scaling=scaling), rope_tables(1e5, 16, 10)):
        assert torch.equal(table[::4], other)
    config = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}
    assert torch.equal(rope_tables(config, 16, 40, scaling=scaling)[0], rope_tables(1e5, 16, 40, scaling=scaling)[0])


def test_partial_rotary_factor():
    tables = rope_tables({"rope_theta": 1e4, "partial_rotary_factor": 0.75}, 128, 50)
    assert tables[0].shape == (50, 48)
    assert torch.equal(tables[0], rope_tables(1e4, 96, 50)[0])


def test_same_frequencies():
    def same(scaling, length):
        return same_frequencies(rope_parameters({"rope_parameters": scaling, "max_position_embeddings": 1024}), length)

    assert same(PHI, 64) == (1, 64)
    assert same(PHI, 65) == (65, math.inf)
    assert same(SCALINGS["dynamic"], 1024) == (1, 1024)
    assert same(SCALINGS["dynamic"], 1500) == (1500, 1500)
    assert same(LLAMA3, 1500) == (1, math.inf)


def test_context_length():
    def context(scaling):
        return context_length(rope_parameters({"rope_scaling": scaling, "max_position_embeddings": 1024}))

    assert context(None) == 1024
    assert context({"type": "linear", "factor": 4.0}) == 4096
    assert context({"type": "dynamic", "factor": 2.0}) == 2048
    assert context(YARN) == 1024
    assert context({"type": "yarn", "factor": 4.0}) == 4096
    assert context({**LLAMA3, "factor": 32.0}) == 1024
    assert context(PHI) == 1024


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"type": "xpos"}}, "rope_type is 'xpos'"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope_type is"),
        ({"rope_scaling": "yarn"}, "rope_scaling is yarn"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "expected one flat dict"),
        ({"rope_scaling": {"type": "linear"}}, "factor is None"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "factor is -2"),
        ({"rope_scaling": {"type": "linear", "factor": math.nan}}, "factor is nan"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "factor is 4, expected a number"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_theta": "big"}, "rope_theta is big"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "max_position_embeddings is None"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 0.5}}, "high_freq_factor is 0.5"),
        ({"rope_scaling": {**PHI, "factor": 2.0, "short_factor": [1.0]}}, "short_factor is [1.0], expected a list of 16"),
        ({"rope_scaling": {**PHI, "factor": 2.0, "short_factor": [0.0] * 16}}, "short_factor is"),
        ({"partial_rotary_factor": 1.5}, "gives 48 of 32 values a head"),
        ({"partial_rotary_factor": 0.1}, "gives 3 of 32 values a head"),
    ],
)
def test_errors(config, message):
    with pytest.raises(ValueError) as error:
        rope_tables(config, 32, 16)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_sizes():
    with pytest.raises(ValueError, match="max_positions is 0"):
        rope_tables(1e4, 32, 0)
    with pytest.raises(ValueError, match=r"head_dim is 3\.5"):
        rope_tables(1e4, 3.5, 16)
