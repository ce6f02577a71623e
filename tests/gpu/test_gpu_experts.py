"""The experts on a CUDA GPU: grouped products against the plain loop, and no waiting for the device."""

import pytest
import torch
from torch import Tensor

from pretrain.config import ModelConfig
from pretrain.model.moe.grouped import grouped_swiglu
from pretrain.model.moe.layer import MoE
from pretrain.model.moe.loop import loop_swiglu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; PyTorch sees none here"),
]

CUDA = torch.device("cuda")
E, D, F = 8, 256, 128
SIZES = {"even": [64] * E, "uneven": [3, 0, 200, 17, 0, 129, 1, 162], "one": [0, 0, 512, 0, 0, 0, 0, 0]}


def relative(x: Tensor, wanted: Tensor) -> float:
    x, wanted = x.detach().cpu().double(), wanted.detach().cpu().double()
    return float((x - wanted).norm() / wanted.norm())


def inputs(dtype: torch.dtype, device: torch.device, n_rows: int) -> list[Tensor]:
    """x, gate_up, down and weights. bf16 represents the numbers exactly."""
    generator = torch.Generator().manual_seed(0)
    shapes = (n_rows, D), (E, 2 * F, D), (E, D, F), (n_rows,)
    drawn = [torch.randn(shape, generator=generator).bfloat16() / 8 for shape in shapes]
    return [x.to(device, torch.float32 if x.ndim == 1 else dtype).requires_grad_() for x in drawn]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-4)], ids=["bf16", "fp32"])
def test_grouped_products_match_the_loop_in_fp32_on_the_cpu(
    sizes: list[int], dtype: torch.dtype, tolerance: float
) -> None:
    rows, garbage = sum(sizes), 5
    ends = torch.tensor(sizes).cumsum(0).int()
    ours, reference = inputs(dtype, CUDA, rows + garbage), inputs(torch.float32, torch.device("cpu"), rows + garbage)
    with torch.no_grad():
        ours[0][rows:] = torch.inf
    y, wanted = grouped_swiglu(*ours, ends.to(CUDA))[:rows], loop_swiglu(*reference, ends)[:rows]
    y.float().square().sum().backward()
    wanted.square().sum().backward()
    assert relative(y, wanted) < tolerance
    for gradient, expected in zip(ours, reference, strict=True):
        assert gradient.grad is not None
        assert expected.grad is not None
        n = rows if gradient.ndim < 3 else E
        assert relative(gradient.grad[:n], expected.grad[:n]) < tolerance


def test_the_layer_never_waits_for_the_gpu() -> None:
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("torch's grouped_mm reads the sizes of groups on the host of this GPU")
    config = ModelConfig.model_validate(
        {"architecture": "moe", "d_model": D, "d_ff": F, "moe": {"n_experts": E, "capacity_factor": 1.0}}
    )
    torch.manual_seed(0)
    layer = MoE(config, layer=0).to(CUDA)
    layer.gate.reset_buffers()
    for parameter in layer.parameters():
        parameter.data = torch.randn_like(parameter).mul_(0.1).bfloat16()
    x_BSD = torch.randn(2, 64, D, device=CUDA, dtype=torch.bfloat16)
    keys_B = torch.zeros(2, dtype=torch.int64, device=CUDA)

    def step() -> Tensor:
        routing = layer.gate(x_BSD, keys_B)
        in_flight = layer.dispatcher.send(x_BSD.flatten(0, 1), routing.expert_TK, routing.weight_TK, routing.key_TK)
        out: Tensor = layer.dispatcher.combine(layer.experts(layer.dispatcher.receive(in_flight)), in_flight)
        out.float().square().sum().backward()
        return out

    step()  # the first call allocates workspaces
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = step()
        with pytest.raises(RuntimeError, match="synchronizing"):  # negative control: this waits
            out[0, 0].item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(out).all()
