"""What the verbs that write text share: their options, and the model on one device or on those of a layout."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.api.drawing import check_drawing
from orchestrator.config.options import option
from orchestrator.errors import ConfigError, DataError

if TYPE_CHECKING:
    from orchestrator.data.document_format import SpecialTokens
    from orchestrator.inference.generator import Writer

MAX_TEXT_BYTES = 1 << 24
_ONE_DEVICE = ("auto", "cpu", "cuda", "rocm")
LAYOUT_HELP = """
On several devices, or on TPU and Trainium: layout.* and hardware.*, as for train, such as layout.tensor=2
hardware.devices=2; or start the same command by torchrun or srun. Without them the model is on one device, in fp32."""


@dataclasses.dataclass(frozen=True)
class DrawingOptions:
    """The options of all verbs that draw tokens."""

    checkpoint: str = option("latest", help="latest, a run, a checkpoint, or hf:DIRECTORY of transformers")
    tokens: int = option(128, help="tokens to write at most, 1 or more")
    temperature: float = option(0.8, help="0 or more; 0 takes the likeliest token each time")
    top_k: int | None = option(None, help="draw among the k likeliest tokens, 1 or more")
    top_p: float | None = option(
        None, help="draw among the likeliest that have this probability together, above 0 to 1"
    )
    min_p: float | None = option(None, help="draw among those of this part of the likeliest one's probability, 0 to 1")
    repetition_penalty: float = option(1.0, help="above 1: tokens that are there already become less likely")
    stop: tuple[str, ...] = option((), help="texts at which to end, comma-separated; \\n is a line break")
    seed: int = option(0, help="of the draws, 0 or more")
    json: bool = option(False, help="print a JSON object per text")
    hardware: str = option("auto", help="auto, cpu, cuda, rocm; on several devices what train knows")
    runs_dir: str = option("runs", help="where latest looks")

    @property
    def sampling(self) -> dict[str, Any]:
        """Arguments of `inference.sampling.Sampling`."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        return {name: getattr(self, name) for name in names}

    @property
    def stops(self) -> list[str]:
        """Texts at which to end."""
        return [text.replace("\\n", "\n") for text in self.stop]

    def problems(self, samples: int = 1, rows: int = 1) -> list[ConfigError]:
        """List what is wrong with the values.

        Args:
            samples: texts of a prompt.
            rows: texts at one time.
        """
        return check_drawing(tokens=self.tokens, samples=samples, rows=rows, seed=self.seed, **self.sampling)


def split_words(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide words into the options of a verb and keys of the configuration.

    Args:
        argv: the words.
    """
    keys = [word for word in argv if word.partition("=")[0].split(".")[0] in ("layout", "hardware")]
    keys = [word for word in keys if not word.startswith("hardware=")]
    return [word for word in argv if word not in keys], keys


def run_writer(
    options: DrawingOptions,
    keys: Sequence[str],
    task: str,
    job: Any,
    alone: Callable[[Writer], None],
    spelt: SpecialTokens | None = None,
) -> int:
    """Load the model, on one device or as the keys say, and let it write.

    Args:
        options: of the verb.
        keys: of the configuration, that were given.
        task: of `launch.model_job`, for several devices.
        job: its arguments, a dataclass.
        alone: writes with the model on one device.
        spelt: what special tokens in a prompt are; None: as the model was trained.

    Returns:
        The exit status.

    Raises:
        UserError: wrong keys, or a checkpoint that cannot be used; before anything is printed.
    """
    from orchestrator.config.schema import HardwareConfig
    from orchestrator.hardware.target_table import find_world, resolve
    from orchestrator.runs.messages import warn

    world = find_world(HardwareConfig(), os.environ)
    if not keys and options.hardware in _ONE_DEVICE and (world is None or world.size == 1):
        from orchestrator.interop.imported_source import import_once, is_foreign
        from orchestrator.runs.stored_model import find_checkpoint

        where = options.checkpoint
        where = str(import_once(where, options.runs_dir)) if is_foreign(where) else where
        found = find_checkpoint(where, options.runs_dir, warn)
        target = resolve(HardwareConfig(target=options.hardware, devices=1))  # type: ignore[arg-type]

        from orchestrator.checkpoint.checkpoint import Checkpoint
        from orchestrator.inference.generator import Writer

        writer = Writer(Checkpoint(found), target.device(0), spelt)
        print(f"checkpoint {found}", file=sys.stderr)
        alone(writer)
        return 0

    from orchestrator.config.compose import compose
    from orchestrator.launch.model_job import open_job

    quoted = options.runs_dir.replace("'", r"\'")
    which = [] if options.hardware == "auto" else [f"hardware={options.hardware}"]
    opened = open_job(compose([*which, *keys, f"runs_dir='{quoted}'"]), options.checkpoint)
    if opened.speaks:
        print(f"checkpoint {opened.checkpoint.directory}", file=sys.stderr)
    opened.run(task, dataclasses.asdict(job))
    return 0


def read_text(path: str) -> str:
    """Return the text of a file.

    Args:
        path: of the file; -: standard input.

    Raises:
        DataError: it cannot be read, is not UTF-8, or too large.
    """
    try:
        if path == "-":
            content = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
        else:
            with open(Path(path).expanduser(), "rb") as file:
                content = file.read(MAX_TEXT_BYTES + 1)
        text = content.decode("utf-8")
    except OSError as error:
        raise DataError("the file cannot be read", got=f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise DataError("the file is not text in UTF-8", got=path) from None
    if len(content) > MAX_TEXT_BYTES:
        raise DataError("the file is too large", got=path, allowed=f"{MAX_TEXT_BYTES:,} bytes")
    return text
