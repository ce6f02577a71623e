"""Peak FLOP/s of devices: the denominator of MFU.

Only names that are known for certain are listed, each with its source. A slice of a GPU (MIG), a cut-down export model,
a CPU or anything newer than this table has no entry, and no MFU is shown for it. Imports no torch: names are strings.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """One kind of device: its short name, its peak in dense bf16 matrix multiplication, and the source."""

    label: str
    bf16_flops: float
    """FLOP/s, without structured sparsity, at the boost clock."""
    source: str


A100 = Accelerator("A100", 312e12, "NVIDIA A100 datasheet, June 2021")
H100_SXM = Accelerator("H100 SXM", 989e12, "NVIDIA H100 architecture white paper, table 2: 1830 MHz, 528 tensor cores")
H100_PCIE = Accelerator("H100 PCIe", 756e12, "NVIDIA H100 architecture white paper, table 2")
H200_SXM = Accelerator("H200 SXM", 989e12, "NVIDIA H200 datasheet: half of the sparse 1,979 TFLOP/s")
B200 = Accelerator("B200", 2250e12, "NVIDIA DGX B200 datasheet: half of the sparse 36 PFLOP/s over 8 GPUs")
GB200 = Accelerator("GB200", 2500e12, "NVIDIA GB200 NVL72 datasheet: half of the sparse 360 PFLOP/s over 72 GPUs")
MI300X = Accelerator("MI300X", 1307.4e12, "AMD Instinct MI300X datasheet")
MI325X = Accelerator("MI325X", 1307.4e12, "AMD Instinct MI325X datasheet")
MI355X = Accelerator(
    "MI355X", 2516.6e12, "AMD Instinct MI355X datasheet: 256 compute units at 2.4 GHz, 4096 FLOP a clock"
)

BY_NAME = {
    "A100-SXM4-40GB": A100,
    "A100-SXM4-80GB": A100,
    "A100-PCIE-40GB": A100,
    "A100-PCIE-80GB": A100,
    "A100 80GB PCIe": A100,
    "H100 80GB HBM3": H100_SXM,
    "H100 PCIe": H100_PCIE,
    "H200": H200_SXM,
    "B200": B200,
    "GB200": GB200,
    "Instinct MI300X": MI300X,
    "Instinct MI325X": MI325X,
    "Instinct MI355X": MI355X,
}
"""Names from `torch.cuda.get_device_name()` without the maker's name, which drivers before 2021 left out."""


def find_accelerator(device_name: str) -> Accelerator | None:
    """Return the entry for a name from `torch.cuda.get_device_name()`; None if it is not known for certain."""
    return BY_NAME.get(device_name.strip().removeprefix("NVIDIA ").removeprefix("AMD "))
