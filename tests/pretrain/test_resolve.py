"""Every `auto` becomes a value once, by its rule and with a reason; a resumed run keeps the values it began with."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.config import AUTO, RunConfig, flatten
from pretrain.config.loading import load
from pretrain.errors import UserError
from pretrain.setup.resolve import ResolvedRun, resolve_run

TINY = ("model.preset=tiny", "data.seq_len=128", "train.steps=200", "train.batch_size=32")
BF16 = {"avx512_bf16": True}


@pytest.fixture(autouse=True)
def _plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without bf16, a compiler, no GPU."""
    machine(monkeypatch)


def machine(
    patch: pytest.MonkeyPatch, *, gpu: bool = False, cpu: dict[str, bool] | None = None, compiler: str | None = "g++"
) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: gpu)
    patch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    patch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 2**30))
    patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: gpu)
    patch.setattr(torch.cpu, "get_capabilities", lambda: cpu or {})
    patch.setattr("shutil.which", lambda name: name if name == compiler else None)
    patch.setattr("pretrain.model.kernels.flash_attn_version", lambda *_: None)


def resolve(*args: str, size: int = 300, previous: RunConfig | None = None, world_size: int = 1) -> ResolvedRun:
    config = load(None, [*TINY, *args]).config
    return resolve_run(config, tokenizer_size=size, world_size=world_size, previous=previous)


def resolved(*args: str, size: int = 300, previous: RunConfig | None = None) -> dict[str, Any]:
    return flatten(resolve(*args, size=size, previous=previous).config)


def test_on_a_plain_cpu_these_are_the_decisions_and_reasons() -> None:
    run = resolve()
    decisions = run.reported_decisions
    assert {decision.key: (decision.value, decision.reason) for decision in decisions} == {
        "data.tokenizer": ("data/default/tokenizer.json", "the one the data was made with"),
        "model.vocab_size": (320, "the tokenizer's 300, rounded up"),
        "optim.warmup": (20, "a tenth of the run, 2,000 steps at most"),
        "optim.decay": (1.0, "the usual for cosine"),
        "train.device": ("cpu", "no GPU is visible"),
        "train.precision": ("fp32", "the CPU has no native bf16"),
        "train.micro_batch_size": (32, "divides the batch of 32, at most 16,384 tokens a pass"),
        "train.compile": (False, "465B FLOPs are too few to repay compiling"),
        "train.attention": ("sdpa", "PyTorch's scaled_dot_product_attention runs everywhere"),
    }
    assert AUTO not in flatten(run.config).values()
    again = resolve_run(run.config, tokenizer_size=300)
    assert (again.config, again.decisions) == (run.config, ())
    assert decisions[1].as_text().plain == "model.vocab_size = 320 (the tokenizer's 300, rounded up)"


def test_settings_that_are_set_are_not_decided() -> None:
    args = (
        "model.vocab_size=512",
        "train.micro_batch_size=3",
        "train.precision=bf16",
        "train.compile=false",
        "optim.decay=0.5",
    )
    run = resolve(*args)
    config = run.config
    assert [decision.key for decision in run.reported_decisions] == [
        "data.tokenizer",
        "optim.warmup",
        "train.device",
        "train.attention",
    ]
    assert (config.model.vocab_size, config.train.micro_batch_size, config.train.precision, config.optim.decay) == (
        512,
        3,
        "bf16",
        0.5,
    )


@pytest.mark.parametrize(("size", "rows"), [(257, 320), (320, 320), (321, 384), (50_257, 50_304), (128_256, 128_256)])
def test_the_vocabulary_is_rounded_up_to_a_multiple_of_64(size: int, rows: int) -> None:
    assert resolved(size=size)["model.vocab_size"] == rows


@pytest.mark.parametrize(
    ("seq_len", "batch", "micro"),
    [(128, 1000, 125), (512, 1000, 25), (512, 8, 8), (512, 7, 7), (512, 37, 1), (16_385, 9, 1)],
)
def test_a_microbatch_divides_the_batch_and_holds_at_most_16384_tokens(seq_len: int, batch: int, micro: int) -> None:
    found = resolved(f"data.seq_len={seq_len}", f"train.batch_size={batch}", "model.max_seq_len=100000")
    assert found["train.micro_batch_size"] == micro


@pytest.mark.parametrize(
    ("ramp", "start", "micro"),
    [
        (0, 1, 32),
        (10, 1, 32),  # fills up 175 sequences, 0.5% of what the run computes
        (400, 1, 8),  # 5.4%; 16 would be 10.8%
        (1000, 1, 4),  # 8.8%; 8 would be 18.4%
        (1000, 16, 4),  # 6.0%; 8 would be 13.0%
        (1000, 30, 32),  # 4.7%
    ],
)
def test_padding_in_a_batch_ramp_is_at_most_a_tenth_of_the_run(ramp: int, start: int, micro: int) -> None:
    args = (
        "train.batch_size=32",
        "train.steps=1000",
        f"train.batch_ramp_steps={ramp}",
        f"train.batch_ramp_start={start}",
    )
    (decision,) = (decision for decision in resolve(*args).decisions if decision.key == "train.micro_batch_size")
    assert decision.value == micro
    assert ("fills up at most 10% of the run's sequences in the batch ramp" in decision.reason) == (micro < 32)


@pytest.mark.parametrize(
    ("batch", "micro", "note"),
    [
        (8, 4, None),
        (9, 8, "train.batch_size=9: each step also computes 7 empty sequences, so that all microbatches have one size; "
               "train.micro_batch_size=1 or 3 would need none"),
        (7, 4, "train.batch_size=7: each step also computes 1 empty sequence, so that all microbatches have one size; "
               "train.micro_batch_size=1 would need none"),
    ],
)  # fmt: skip
def test_padding_in_every_step_is_noted(batch: int, micro: int, note: str | None) -> None:
    args = (f"train.batch_size={batch}", f"train.micro_batch_size={micro}")
    expected = () if note is None else (f"train.micro_batch_size={micro} does not divide {note}",)
    assert resolve(*args).notes == expected


def test_decisions_on_the_layout_are_reported_if_there_are_several_ranks() -> None:
    decisions = resolve("parallel.tensor=2", "parallel.replicate=2", world_size=8).reported_decisions
    reported = {
        decision.key: (decision.value, decision.reason)
        for decision in decisions
        if decision.key.startswith("parallel.")
    }
    assert reported == {
        "parallel.shard": (2, "what parallel.replicate=2 x parallel.tensor=2 = 4 leaves of 8 processes"),
        "parallel.zero": (3, "the least memory"),
        "parallel.sequence": (True, "parallel.tensor=2"),
        "parallel.stages_per_rank": (1, "parallel.pipeline=1, parallel.schedule=1f1b"),
    }
    assert {decision.key: decision.value for decision in decisions}["train.micro_batch_size"] == 8


def test_the_final_decay_of_wsd_is_a_fifth() -> None:
    assert resolved("optim.schedule=wsd")["optim.decay"] == 0.2


def test_a_cpu_with_bf16_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, precision in (("avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("avx2", "fp32")):
        machine(monkeypatch, cpu={name: True})
        assert resolved()["train.precision"] == precision


def test_a_long_run_on_a_cpu_is_compiled_if_there_is_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    long = "train.steps=20000"
    assert (resolved(long)["train.compile"], resolved(long)["train.attention"]) == (True, "blocked")
    machine(monkeypatch, compiler="clang++")
    assert resolved(long)["train.compile"] is False  # torch.compile takes another than g++ only where CXX names it
    monkeypatch.setenv("CXX", "clang++")
    assert resolved(long)["train.compile"] is True
    monkeypatch.delenv("CXX")
    machine(monkeypatch)
    monkeypatch.setattr("sysconfig.get_path", lambda _: "/nowhere")
    assert resolved(long)["train.compile"] is False  # no Python.h
    monkeypatch.undo()
    machine(monkeypatch, compiler=None)
    assert (resolved(long)["train.compile"], resolved(long)["train.attention"]) == (False, "sdpa")


def test_on_a_gpu_auto_is_cuda_bf16_compiled_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpu=True)
    found = resolved()
    assert [found[f"train.{name}"] for name in ("device", "precision", "compile", "attention")] == [
        "cuda",
        "bf16",
        True,
        "varlen",
    ]


def test_a_resumed_run_keeps_the_decisions_its_numbers_depend_on_whatever_the_rules_say_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    began = resolve("optim.warmup=7").config
    machine(monkeypatch, cpu=BF16)
    run = resolve(previous=began)
    assert run.config == began
    kept = {decision.key for decision in run.decisions if decision.reason == "as the run began"}
    assert kept == {"model.vocab_size", "optim.warmup", "optim.decay", "train.precision"}
    assert (resolved()["train.precision"], resolved()["optim.warmup"]) == (
        "bf16",
        20,
    )  # what they would have been without it


def test_a_run_resumes_on_another_device_in_the_same_precision_with_that_devices_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, gpu=True)
    on_gpu = resolve().config
    machine(monkeypatch)
    moved = resolved(previous=on_gpu)
    assert [moved[f"train.{name}"] for name in ("device", "precision", "compile", "attention")] == [
        "cpu",
        "bf16",
        False,
        "sdpa",
    ]
    machine(monkeypatch, gpu=True)
    assert [resolved("train.device=cpu", previous=on_gpu)[f"train.{name}"] for name in ("device", "attention")] == [
        "cpu",
        "sdpa",
    ]


@pytest.mark.parametrize(
    "args", [(), ("train.precision=bf16", "train.compile=true"), ("train.attention=varlen",)], ids=str
)
def test_a_missing_gpu_is_reported_before_any_rule_queries_it(
    monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]
) -> None:
    def query(*_: object, **__: object) -> bool:
        raise AssertionError("Torch not compiled with CUDA enabled")

    for name in ("get_device_name", "get_device_capability", "is_bf16_supported"):
        monkeypatch.setattr(torch.cuda, name, query)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    with pytest.raises(UserError) as refusal:
        resolved("train.device=cuda", *args)
    expected = "train.device=cuda, but PyTorch sees no GPU here: use train.device=cpu or auto "
    assert str(refusal.value) == f"{expected}(PyTorch 2.13.0+cpu is built without CUDA)"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(UserError, match=r"sees no GPU here: use train\.device=cpu or auto$"):
        resolved("train.device=cuda", *args)


def test_a_gpu_without_bf16_takes_fp32_and_refuses_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpu=True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    assert resolved()["train.precision"] == "fp32"
    with pytest.raises(
        UserError,
        match=r"train\.precision=bf16, but NVIDIA H100 .* cannot compute in bf16: use train\.precision=fp32 or auto",
    ):
        resolved("train.precision=bf16")


@pytest.mark.parametrize(
    ("gpu", "missing"), [(False, r"C\+\+ compiler \(g\+\+\)"), (True, r"C compiler \(gcc or clang\)")]
)
def test_compiling_without_a_compiler_is_refused_before_anything_begins(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, missing: str
) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    machine(monkeypatch, gpu=gpu)
    assert resolved("train.compile=true")["train.compile"] is True
    machine(monkeypatch, gpu=gpu, compiler=None)
    assert resolved()["train.compile"] is False
    with pytest.raises(
        UserError,
        match=rf"train\.compile=true, but there is no {missing}: install it, or use train\.compile=false or auto",
    ):
        resolved("train.compile=true")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("train.attention=flash_attn",),
            "train.attention=flash_attn does not run here .* use varlen, sdpa or auto .the flash-attn package is not "
            "installed, or not for",
        ),
        (
            ("train.attention=varlen", "train.precision=fp32"),
            "train.attention=varlen does not run here .*fp32 .* use sdpa or auto",
        ),
        (("train.attention=varlen", "model.head_dim=12"), "model.head_dim=12: use sdpa or auto"),
    ],
)
def test_kernels_that_do_not_run_are_refused_before_anything_begins(
    monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], message: str
) -> None:
    machine(monkeypatch, gpu=True)
    with pytest.raises(UserError, match=message):
        resolved(*args)


def test_a_vocabulary_as_large_as_the_tokenizers_is_enough() -> None:
    assert resolved("model.vocab_size=300")["model.vocab_size"] == 300
    with pytest.raises(UserError, match=r"model\.vocab_size=299 is smaller than the tokenizer's vocabulary of 300"):
        resolved("model.vocab_size=299")
