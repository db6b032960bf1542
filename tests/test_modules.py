"""RMSNorm and SwiGLU as modules: state dicts, constructors and numbers of what they replace."""

import pytest
import torch
from torch import nn
from trillama.bench import oracle
from trillama.kernels import RMSNorm, SwiGLU, use_backend


@pytest.mark.parametrize("shape", [64, (64,), (4, 16), torch.Size([2, 2, 16])], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["weight", "bare"])
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_rms_norm_is_torchs(triton, device, dtype, shape, affine, eps):
    theirs = nn.RMSNorm(shape, eps, affine, device=device, dtype=dtype)
    ours = RMSNorm(shape, eps, affine, device=device, dtype=dtype)
    if affine:
        nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    assert ours.normalized_shape == theirs.normalized_shape
    x = (0.01 * torch.randn(3, 5, *theirs.normalized_shape)).to(dtype).to(device)
    axes = len(theirs.normalized_shape)
    exact = oracle.rms_norm(
        x.cpu().double().flatten(-axes), ours.weight.detach().cpu().double().flatten() if affine else None,
        eps or torch.finfo(torch.float32).eps,
    )  # fmt: skip
    plain = theirs(x).cpu()
    oracle.check(ours(x).cpu().detach(), exact.view(x.shape), plain.detach())
    assert triton.names == ["_rms_norm_kernel"]


def test_rms_norm_takes_positional_arguments_as_torchs_does():
    assert repr(RMSNorm(8, 1e-5, False)) == repr(nn.RMSNorm(8, 1e-5, False))
    assert RMSNorm(8).eps == 1e-6
    assert RMSNorm(8, device="meta").weight.is_meta


def test_gemmas_weight_starts_at_zero(triton, device):
    norm = RMSNorm(32, offset=1.0, casting="gemma").to(device)
    assert not norm.weight.any()
    x = torch.randn(4, 32, device=device)
    oracle.check(norm(x).cpu().detach(), oracle.rms_norm(x.cpu().double(), None))


def test_rms_norm_refuses_another_shape():
    with pytest.raises(ValueError, match=r"RMSNorm: x has shape \(2, 9\), expected \(\*, 8\)"):
        RMSNorm(8)(torch.randn(2, 9))


def test_gradients_reach_the_weight(triton, device):
    norm, x = RMSNorm((2, 16)).to(device), torch.randn(3, 2, 16, device=device, requires_grad=True)
    norm(x).sum().backward()
    x64, w64 = oracle.exact(x.flatten(-2), norm.weight.flatten())
    oracle.rms_norm(x64, w64).sum().backward()
    oracle.check(norm.weight.grad.cpu().flatten(), w64.grad, fp32=1e-5)
    oracle.check(x.grad.cpu().flatten(-2), x64.grad, fp32=1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("casting", ["llama", "gemma", "none"])
@pytest.mark.parametrize("shape", [(64,), (4, 16), (1,)], ids=str)
def test_rms_norm_of_one_row_alone(backend, device, shape, casting):
    """normalized_shape is all of x's shape: outputs and gradients."""
    norm = RMSNorm(shape, 1e-5, device=device, offset=0.5, casting=casting)
    x = torch.randn(shape, device=device, requires_grad=True)
    with use_backend(backend):
        y = norm(x)
        y.square().sum().backward()
    x64, w64 = oracle.exact(x.flatten(), norm.weight.flatten())
    exact = oracle.rms_norm(x64, w64, 1e-5, 0.5)
    exact.square().sum().backward()
    oracle.check(y.cpu().detach().flatten(), exact)
    # A difference of two terms, 0 for one element: it has the rounding of the terms, which grow as x shrinks.
    terms = 2 * exact * (0.5 + w64) / (x64.square().mean() + 1e-5).sqrt()
    off = x.grad.cpu().flatten().double() - x64.grad
    assert off.abs().max() <= 8 * torch.finfo(torch.float32).eps * terms.abs().max()
    oracle.check(norm.weight.grad.cpu().flatten(), w64.grad, fp32=1e-5)


def test_rms_norm_refuses_a_negative_eps():
    with pytest.raises(ValueError, match=r"rms_norm: eps is -1\.0, expected a finite number, at least 0"):
        RMSNorm(8, -1)(torch.randn(2, 8))


def hugging_face(module, **changes):
    """A Llama's `module` with random weights; needs transformers."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=48, intermediate_size=112, num_attention_heads=4, **changes)
    return llama.LlamaMLP(config) if module == "mlp" else llama.LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)


@pytest.mark.parametrize("bias", [False, True])
def test_swiglu_is_hugging_faces(triton, device, bias):
    theirs = hugging_face("mlp", mlp_bias=bias).to(device)
    ours = SwiGLU(48, 112, bias).to(device)
    ours.load_state_dict(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    x = torch.randn(2, 7, 48, device=device)
    y, expected = ours(x), theirs(x)
    assert oracle.error(y, expected.double()) < 1e-6
    sides = ((y, ours), (expected, theirs))
    ours_grads, their_grads = (torch.autograd.grad(out.square().sum(), m.parameters()) for out, m in sides)
    assert all(oracle.error(a, b.double()) < 1e-5 for a, b in zip(ours_grads, their_grads))
    assert triton.names == ["_swiglu_kernel", "_swiglu_backward_kernel"]


def test_rms_norm_loads_hugging_faces_weights(triton, device):
    theirs = hugging_face("norm").to(device)
    nn.init.normal_(theirs.weight)
    ours = RMSNorm(48, theirs.variance_epsilon).to(device)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 7, 48, device=device)
    assert oracle.error(ours(x), theirs(x).double()) < 1e-6


def test_modules_run_on_the_reference():
    with use_backend("reference"):
        x = torch.randn(2, 3, 48, dtype=torch.float64)
        y = SwiGLU(48, 64, dtype=torch.float64)(RMSNorm(48, dtype=torch.float64)(x))
    assert y.shape == x.shape
