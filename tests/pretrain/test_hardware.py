"""The peaks that MFU divides by."""

import pytest

from pretrain.estimate.hardware import find_accelerator


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_known_devices_have_their_published_dense_bf16_peak(name: str, tflops: float) -> None:
    accelerator = find_accelerator(name)
    assert accelerator is not None
    assert accelerator.bf16_flops == tflops * 1e12
    assert accelerator.source


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H800",
        "NVIDIA H20",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090",
        "Intel(R) Xeon(R) CPU",
        "H",
        "",
    ],
)
def test_a_name_that_only_resembles_a_known_one_has_no_peak(name: str) -> None:
    assert find_accelerator(name) is None
