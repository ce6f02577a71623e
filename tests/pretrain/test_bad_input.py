"""Every bad input ends, at the real entry point, in exit code 2 and one line that says what to change; the disk is as
it was."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pretrain.train.loop import Outcome

Pretrain = Callable[..., Any]  # of the fixture in tests/conftest.py
RunTiny = Callable[..., Outcome]
TinyArgs = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a command writes without being asked lands where the test looks."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """report.html has its own tests and costs most of the time of a tiny run."""
    monkeypatch.setattr("pretrain.train.run.write_report", lambda _: None)


ARGS = {
    "unknown key": (["train.stepz=5"], "train.stepz is not a setting; did you mean train.steps?"),
    "unknown key in a section of a section": (["model.rope.tehta=1"], "did you mean model.rope.theta?"),
    "unknown section": (["trian.steps=5"], "trian is not a setting; did you mean train?"),
    "key without its section": (["warmup=5"], "warmup is not a setting; did you mean optim.warmup?"),
    "unknown key of a source": (
        ["data.sources=[{kind: text, path: x}]"],
        "data.sources.0.path is not a setting; did you mean data.sources.0.paths?",
    ),
    "wrong type": (["train.steps=many"], "train.steps='many': input should be a valid integer"),
    "wrong type under auto": (["model.vocab_size=many"], "model.vocab_size='many': input should be a valid integer"),
    "out of range": (["optim.lr=-1"], "optim.lr=-1: input should be greater than 0"),
    "infinite": (["optim.lr=.inf"], "optim.lr=inf: input should be a finite number"),
    "not a number": (["optim.max_grad_norm=nan"], "optim.max_grad_norm='nan': input should be a finite number"),
    "not one of the choices": (["optim.kind=unknown"], "optim.kind='unknown': input should be 'adamw' or 'muon'"),
    "a value for a section": (["train=5"], "train=5: is a section; set what is in it"),
    "an argument without a value": (["train.steps"], "train.steps: no such file, and no preset of that name"),
    "a value that is no YAML": (["log.samples=[a"], "log.samples: `[a` is not a YAML value; quote it"),
    "heads that do not divide": (
        ["model.n_heads=6", "model.n_kv_heads=4"],
        "model.n_heads=6 is not divisible by model.n_kv_heads=4; try 1, 2, 3, 6",
    ),
    "unknown model": (["model.preset=9000b"], "9000b: no such file, and no preset of that name; presets are 125m, 1b"),
}


@pytest.mark.parametrize(("args", "message"), ARGS.values(), ids=ARGS)
@pytest.mark.parametrize("command", [("train",), ("config", "show")], ids=["train", "config show"])
def test_wrong_arguments(refused: Callable[..., str], command: tuple[str, ...], args: list[str], message: str) -> None:
    assert message in refused(*command, *args)


FILES = {
    "no YAML": ("train: [", "cannot be read as YAML"),
    "no tree": ("- train", "holds a list; a config is a tree of sections such as `train:`"),
    "not UTF-8": (b"train:\n  steps: \xff\xfe", "cannot be read as YAML"),
    "unknown key": ("train: {stepz: 5}", "train.stepz is not a setting; did you mean train.steps?"),
    "value for a section": ("train: 5", "train=5: is a section"),
}


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES)
def test_wrong_config_files(refused: Callable[..., str], tmp_path: Path, content: str | bytes, message: str) -> None:
    (tmp_path / "my.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
    assert message in refused("train", "my.yaml")


def test_a_missing_config_file(refused: Callable[..., str]) -> None:
    assert "nowhere.yaml: no such file, and no preset of that name; presets are demo" in refused(
        "train", "nowhere.yaml"
    )


NO_GPU = "train.device=cuda, but PyTorch sees no GPU here: use train.device=cpu or auto"
SETTINGS = {
    "vocabulary larger than the model's": (
        ["model.vocab_size=256"],
        "model.vocab_size=256 is smaller than the tokenizer's vocabulary of 300 .* set model.vocab_size=320 or auto",
    ),
    "sequence longer than the data": (
        ["data.seq_len=1000000", "model.max_seq_len=1000000"],
        r"data.seq_len=1000000 is longer than the data: .*train holds \d+ tokens; lower data.seq_len or prepare more "
        r"text",
    ),
    "sequence longer than the model's": (
        ["data.seq_len=128"],
        "data.seq_len=128 is longer than model.max_seq_len=64: lower the first",
    ),
    "warm-up longer than the run": (
        ["optim.warmup=40"],
        "optim.warmup=40 is not below train.steps=40: .* try optim.warmup=4",
    ),
    "microbatch larger than the batch": (
        ["train.micro_batch_size=9"],
        "train.micro_batch_size=9 is larger than train.batch_size=4",
    ),
    "a batch that fits into no memory": (
        ["train.batch_size=999999999989"],
        r"train.batch_size=999999999989 sequences of data.seq_len=32 tokens need 953,674 GiB of memory in each "
        r"process, "
        r"and this machine has [\d,]+ GiB: at most \d+ fit",
    ),
    "kernels of a GPU": (
        ["train.attention=varlen"],
        "train.attention=varlen does not run here with train.device=cpu, .* use sdpa or auto",
    ),
    "a GPU that is not there": (
        ["train.device=cuda", "train.precision=auto", "train.compile=auto", "train.attention=auto"],
        NO_GPU,
    ),
    "no data": (["data.path=nowhere"], "data.path=nowhere holds no prepared data; run `pretrain data prepare`"),
    "no tokenizer": (
        ["data.tokenizer=nowhere.json"],
        "data.tokenizer: cannot read nowhere.json: No such file .* name a tokenizer.json",
    ),
    "a prompt that fills the context": (
        [f"log.samples=['{'loop ' * 64}']"],
        r"log.samples: 'loop .*' has \d+ tokens, which leave no room for more in model.max_seq_len=64; shorten it to "
        r"63 or fewer",
    ),
    "run.dir is a file": (["run.dir=file"], "run.dir=file: .* choose a directory that can be written"),
}


@pytest.mark.parametrize(("args", "message"), SETTINGS.values(), ids=SETTINGS)
def test_settings_that_do_not_go_together(
    refused: Callable[..., str], tmp_path: Path, tiny_args: TinyArgs, args: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("mine")
    assert re.search(message, refused("train", *tiny_args(tmp_path / "run", *args)))


def missing(folder: Path) -> tuple[str, str]:
    return f"{{kind: text, paths: [{folder / 'nowhere'}]}}", "nowhere does not exist"


def no_files(folder: Path) -> tuple[str, str]:
    return f"{{kind: text, paths: [{folder}]}}", r"no file below .*text matches \*\.txt, \*\.md"


def empty_files(folder: Path) -> tuple[str, str]:
    for name in "abc":
        (folder / f"{name}.txt").touch()
    return f"{{kind: text, paths: [{folder}]}}", r"hold no text.*text .*text"


def corrupt_parquet(folder: Path) -> tuple[str, str]:
    pq.write_table(pa.table({"text": ["some text of a document"] * 100}), folder / "bad.parquet")
    content = (folder / "bad.parquet").read_bytes()
    (folder / "bad.parquet").write_bytes(content[: len(content) // 2])
    return (
        f"{{kind: parquet, paths: [{folder}]}}",
        r"bad\.parquet: cannot be read, it may be corrupt or unreachable \(.*\); restore it",
    )


def no_parquet(folder: Path) -> tuple[str, str]:
    (folder / "bad.parquet").write_text("this is a letter")
    return f"{{kind: parquet, paths: [{folder}]}}", r"bad\.parquet: cannot be read, it may be corrupt"


@pytest.mark.parametrize("command", ["prepare", "tokenizer"])
@pytest.mark.parametrize("source", [missing, no_files, empty_files, corrupt_parquet, no_parquet])
def test_sources_that_cannot_be_read(
    refused: Callable[..., str], tmp_path: Path, source: Callable[[Path], tuple[str, str]], command: str
) -> None:
    (tmp_path / "text").mkdir()
    args, message = source(tmp_path / "text")
    assert re.search(message, refused("data", command, f"data.sources=[{args}]", "data.path=data"))


def test_data_that_was_prepared_with_other_settings(
    refused: Callable[..., str], tiny_text: Path, tiny_data: Path
) -> None:
    source = f"data.sources=[{{kind: text, paths: [{tiny_text}]}}]"
    args = (
        "data.vocab_size=300",
        "data.tokenizer_sample_mb=1",
        "data.validation_fraction=0.2",
        "data.shard_tokens=4000",
    )
    line = refused("data", "prepare", f"data.path={tiny_data}", source, *args)
    assert "data.validation_fraction was 0.1 and is 0.2. Set another data.path, or delete" in line


@pytest.fixture
def data(tmp_path: Path, tiny_data: Path) -> Path:
    """A copy of the prepared data to damage."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


def test_a_damaged_shard(refused: Callable[..., str], data: Path, tiny_args: TinyArgs, tmp_path: Path) -> None:
    shard = next((data / "train").glob("*.bin"))
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    assert re.search(
        rf"{shard}: block 0 of 1 does not match its checksum; prepare the data again", refused("data", "verify", data)
    )
    shard.write_bytes(shard.read_bytes()[:-2])
    assert str(shard) in refused("train", *tiny_args(tmp_path / "run", f"data.path={data}"))


def test_another_tokenizer_than_the_one_of_the_data(
    refused: Callable[..., str], pretrain: Pretrain, tmp_path: Path, tiny_text: Path, tiny_args: TinyArgs
) -> None:
    source = f"data.sources=[{{kind: text, paths: [{tiny_text}]}}]"
    assert pretrain("data", "tokenizer", source, "data.path=other", "data.vocab_size=290").code == 0
    line = refused("train", *tiny_args(tmp_path / "run", "data.tokenizer=other/tokenizer.json"))
    assert re.search(
        r"data.tokenizer=other/tokenizer.json \(\w+\) is not the tokenizer that made data.path=\S+ \(\w+\); set data.",
        line,
    )


def test_a_run_directory_of_another_config_shows_the_difference(
    refused: Callable[..., str], run_tiny: RunTiny, tiny_args: TinyArgs, tmp_path: Path
) -> None:
    run_tiny(tmp_path / "run", "train.steps=10")
    line = refused(
        "train",
        *tiny_args(
            tmp_path / "run", "train.steps=10", "optim.max_grad_norm=2", "model.qk_norm=true", "checkpoint.keep=9"
        ),
    )
    assert (
        "model.qk_norm: False in the run, True now; optim.max_grad_norm: 1.0 in the run, 2.0 now; put the values "
        "back, or choose another" in line
    )


@pytest.fixture
def trained(run_tiny: RunTiny, tmp_path: Path, data: Path) -> Iterator[Path]:
    """A run of 10 steps with checkpoints after 5 and 10."""
    run_tiny(tmp_path / "run", f"data.path={data}", "train.steps=10", "checkpoint.every=5")
    return tmp_path / "run"


def test_no_checkpoint_is_whole(refused: Callable[..., str], trained: Path, data: Path, tiny_args: TinyArgs) -> None:
    for shard in trained.glob("checkpoints/*/*.distcp"):
        shard.write_bytes(shard.read_bytes()[:-1])
    args = tiny_args(trained, f"data.path={data}", "train.steps=10", "checkpoint.every=5")
    for command in (("train", *args), ("generate", trained)):
        line = refused(*command)
        assert re.search(
            r"none of the 2 checkpoints in \S*/run/checkpoints is valid; the newest fails because \S*step-00000010/",
            line,
        )
        assert re.search(r"has \d+ bytes instead of \d+\. Restore one of them from a copy", line)
        assert "delete " not in line


def test_other_data_than_the_run_was_trained_on(
    refused: Callable[..., str], pretrain: Pretrain, trained: Path, data: Path, tiny_text: Path, tiny_args: TinyArgs
) -> None:
    other = data.with_name("other")
    other.mkdir()
    shutil.copy(data / "tokenizer.json", other)
    source = f"data.sources=[{{kind: text, paths: [{tiny_text}], exclude: ['00*']}}]"
    assert pretrain("data", "prepare", source, f"data.path={other}").code == 0
    line = refused("train", *tiny_args(trained, f"data.path={other}", "train.steps=10", "checkpoint.every=5"))
    assert re.search(
        r"step-00000010 was trained on other data .* put the data back, or start in another run\.dir", line
    )


def test_a_prompt_that_fills_the_context(refused: Callable[..., str], trained: Path) -> None:
    line = refused("generate", trained, "loop " * 64)
    assert re.search(
        r"the prompt has \d+ tokens, which leave no room for more in model\.max_seq_len=64; shorten it to 63 or fewer",
        line,
    )


def test_a_damaged_config_of_a_run(refused: Callable[..., str], trained: Path, data: Path, tiny_args: TinyArgs) -> None:
    (trained / "config.yaml").write_text("model: [")
    args = tiny_args(trained, f"data.path={data}", "train.steps=10", "checkpoint.every=5")
    for command in (("train", *args), ("generate", trained), ("report", trained)):
        assert re.search(r"run/config\.yaml(: cannot be read as YAML| is not YAML)", refused(*command))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generate", "is not a run directory: it has no config.yaml; `pretrain train` creates one"),
        ("report", "is not a run directory: it holds no config.yaml"),
        ("data verify", "holds no prepared data"),
        ("data inspect", "holds no prepared data"),
    ],
)
@pytest.mark.parametrize("folder", ["empty", "nowhere"])
def test_a_folder_that_is_not_what_the_command_reads(
    refused: Callable[..., str], tmp_path: Path, command: str, message: str, folder: str
) -> None:
    (tmp_path / "empty").mkdir()
    assert message in refused(*command.split(), folder)


def test_a_run_without_a_checkpoint_yet(refused: Callable[..., str], trained: Path) -> None:
    shutil.rmtree(trained / "checkpoints")
    assert "has no checkpoint yet; the first comes after checkpoint.every=5 steps" in refused("generate", trained)
