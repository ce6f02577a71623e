"""Open the tokenizer and the data of a run, and check that they fit the settings and are equal on all ranks."""

from __future__ import annotations

from data_pipeline.reading.loader import Loader
from data_pipeline.storage.tokenized import collect_trusted_paths
from data_pipeline.tokenizing.tokenizer import Tokenizer, load_tokenizer
from pretrain.checkpoint.object_collectives import all_gather_object
from pretrain.config import AUTO, DataConfig, RunConfig, flatten
from pretrain.errors import UserError
from pretrain.inference.sample import check_prompt
from pretrain.setup.batch_schedule import BatchSchedule
from pretrain.train.rank_info import RankInfo


def open_tokenizer(config: RunConfig) -> Tokenizer:
    """Load the tokenizer that the config names. DataError or UserError if the data was never prepared."""
    if config.data.tokenizer != AUTO:
        return load_tokenizer(config.data.tokenizer)
    file = config.data.path / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            f"data.path={config.data.path} holds no prepared data; run `pretrain data prepare` with this config first"
        )
    return load_tokenizer(file)


def open_data(data: DataConfig, seed: int, batches: BatchSchedule) -> tuple[Loader, Loader | None]:
    """Open the training data, and the held-out documents if there are any."""
    trusted = collect_trusted_paths(data)
    train_data = Loader(
        data.path / "train",
        seq_len=data.seq_len,
        seed=seed,
        mixture=data.mixture,
        packing=data.packing,
        window=batches.window,
        total_samples=batches.total_samples,
        on_damage=data.on_damage,
        trusted_paths=trusted,
    )
    if "validation" not in train_data.manifest.splits:
        return train_data, None
    return train_data, Loader(
        data.path / "validation", seq_len=data.seq_len, seed=seed, on_damage=data.on_damage, trusted_paths=trusted
    )


def check_tokenizer(config: RunConfig, tokenizer: Tokenizer, data: Loader) -> None:
    """Raise UserError if another tokenizer made the data, or a prompt of `log.samples` leaves no room to continue
    it."""
    if tokenizer.fingerprint != data.manifest.tokenizer:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer} ({tokenizer.fingerprint}) is not the tokenizer that made "
            f"data.path={config.data.path} ({data.manifest.tokenizer}); set data.tokenizer=auto, or prepare the data "
            "with it in another data.path"
        )
    for prompt in config.log.samples:
        check_prompt(f"log.samples: {prompt!r}", len(tokenizer.encode(prompt)), config.model.max_seq_len)


def check_ranks_agree(config: RunConfig, data: Loader, validation: Loader | None, rank_info: RankInfo) -> None:
    """Raise UserError if another rank resolved other settings or reads other data.

    Each rank looks at its own machine.
    """
    held_out = "none" if validation is None else validation.fingerprint
    ours = flatten(config) | {"the data in data.path": data.fingerprint, "its held-out part": held_out}
    for rank, theirs in enumerate(all_gather_object(ours, rank_info.group)):
        different = [key for key in ours if theirs[key] != ours[key]]
        if different:
            key = different[0]
            raise UserError(
                f"rank {rank_info.world.rank} has {key}={ours[key]}, and rank {rank} has {theirs[key]}: give all "
                "processes the same command and the same files, and replace `auto` where their machines differ"
            )
