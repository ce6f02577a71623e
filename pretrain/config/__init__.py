"""The typed settings of a run, one module per section. A YAML file holds differences from the defaults.

Reads no environment, imports no torch: `pretrain --help` and editors read the settings too.
The sentence under a field is its `--help`, its description in the JSON schema, and its documentation.
`auto` values are replaced once, with a reason, by `pretrain.setup.resolve`; nothing after that meets one.
"""

from data_pipeline.settings import AUTO as AUTO
from pretrain.config.data import DataConfig as DataConfig
from pretrain.config.data import SeqLenStageConfig as SeqLenStageConfig
from pretrain.config.model import ModelConfig as ModelConfig
from pretrain.config.model import RopeConfig as RopeConfig
from pretrain.config.optim import OptimConfig as OptimConfig
from pretrain.config.parallel import ParallelConfig as ParallelConfig
from pretrain.config.resume import Ancestor as Ancestor
from pretrain.config.run import CheckpointConfig as CheckpointConfig
from pretrain.config.run import LogConfig as LogConfig
from pretrain.config.run import RunSettings as RunSettings
from pretrain.config.train import EvalConfig as EvalConfig
from pretrain.config.train import TrainConfig as TrainConfig
from pretrain.config.tree import RunConfig as RunConfig
from pretrain.config.tree import differences as differences
from pretrain.config.tree import flatten as flatten
from pretrain.config.tree import is_prepare_key as is_prepare_key
from pretrain.config.tree import on_resume as on_resume
from pretrain.config.tree import walk as walk
