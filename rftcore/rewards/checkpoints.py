"""What rewards load: models, tokenizers and single files, by hub name or local path."""

from __future__ import annotations

import contextlib
import os.path
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from rftcore.rewards.reward import RewardSpecError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SAFETENSORS = (".safetensors",)
PICKLED = (".bin", ".pt", ".pth")
_HOW_TO_CONVERT = (
    ". Nothing else is unpickled, as that runs the file's code: where it comes from someone you trust, load it once "
    "yourself (torch.load with weights_only=False) and give what safetensors.torch.save_file writes of its tensors"
)
# One of these makes a tokenizer. transformers 5 makes an empty one where there is none, and says nothing.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


def load(
    kind: Any,
    reward: str,
    option: str,
    place: str | Path,
    *,
    revision: str | None = None,
    unused: Sequence[str] = (),
    **settings: Any,
) -> Any:
    """A model, tokenizer or processor of transformers, whole and finite: `kind.from_pretrained(place)`.

    Safetensors are taken where there are any. A model comes in fp32 where `dtype` is not among the settings.

    Args:
        kind: its class, or one of the Auto classes.
        reward, option: the reward that asks, and the option that `place` was given by: for the errors.
        place: a hub name, or a folder that `save_pretrained` wrote.
        unused: parts of the model, such as "pooler", whose weights may be missing.
        settings: for `from_pretrained`.

    Raises: RewardSpecError where it is not there, does not load, lacks weights, or holds NaN or inf.
    """
    place = str(place)
    is_model = hasattr(kind, "from_config") or (isinstance(kind, type) and issubclass(kind, PreTrainedModel))
    if is_model:
        settings = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True, **settings}
    elif "Tokenizer" in kind.__name__ or (isinstance(kind, type) and issubclass(kind, PreTrainedTokenizerBase)):
        file(reward, option, place, *_VOCABULARIES, revision=revision)
    if kind.__module__.startswith("transformers.models.auto"):
        # A repository's own code is never run. Unless told so, transformers asks at the terminal.
        settings["trust_remote_code"] = False
    try:
        with _quietly():
            loaded = kind.from_pretrained(place, revision=revision or "main", **settings)
    except ImportError:
        raise
    # What a wrong or half a file makes of it is of many kinds: of hub, tokenizers, safetensors, pickle and config.
    except Exception as error:
        raise _error(reward, option, place, _why(reward, option, place, error, kind.__name__, revision)) from error
    if not is_model:
        return loaded
    model, info = loaded
    # Names alone in transformers 4, and with both shapes in 5.
    other = sorted(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])
    if other:
        raise _error(reward, option, place, f"other shapes than its config.json says have {_some(other)}")
    missing = [key for key in sorted(info["missing_keys"]) if not set(key.split(".")) & set(unused)]
    if missing:
        raise _error(reward, option, place, f"it is no {kind.__name__}: it lacks the weights {_some(missing)}")
    _check_finite(dict(model.named_parameters()), reward, option, place)
    return model


def file(reward: str, option: str, place: str | Path, *names: str, revision: str | None = None) -> Path:
    """The path of one file.

    Args:
        reward, option: as in `load`.
        place: the file itself; a folder with a file of one of the names, the first that is there; or a hub name, from
            which it is fetched.

    Raises: RewardSpecError where none of them is there.
    """
    place = str(place)
    # os.path, and not pathlib, says no of names that no file can have.
    path = Path(os.path.expanduser(place))
    if os.path.isfile(path):
        return path
    if os.path.isdir(path):
        for name in names:
            if (path / name).is_file():
                return path / name
        raise _error(reward, option, place, f"the folder holds no {' or '.join(names)}")
    if not _is_hub_name(place):
        raise _error(reward, option, place, f"there is no such file or folder; {_put(reward, option)}")
    unreachable: tuple[str, Exception] | None = None
    for name in names:
        try:
            return Path(hf_hub_download(place, name, revision=revision))
        except LocalEntryNotFoundError as error:
            # The cache may hold another one of the names.
            unreachable = unreachable or (name, error)
        except EntryNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise _error(reward, option, place, _why(reward, option, place, error, name, revision)) from error
    if unreachable is not None:
        name, cause = unreachable
        raise _error(reward, option, place, _why(reward, option, place, cause, name, revision)) from cause
    raise _error(reward, option, place, f"the hub's repository holds no {' or '.join(names)}")


def tensors(path: str | Path, reward: str, option: str) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU: of safetensors, or pickled ones read without running code.

    A dictionary that holds them under "state_dict" is unwrapped.

    Raises: RewardSpecError for another file, one that holds something else, and NaN or inf in it.
    """
    path = Path(path)
    if path.suffix not in SAFETENSORS + PICKLED:
        kinds = ", ".join(SAFETENSORS + PICKLED)
        raise _error(reward, option, path, f"it is no file of tensors; those end in {kinds}")
    found: Any
    try:
        if path.suffix in SAFETENSORS:
            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    # What is no pickle, or half of one, makes errors of every kind.
    except Exception as error:
        hint = "" if path.suffix in SAFETENSORS else _HOW_TO_CONVERT
        raise _error(reward, option, path, f"it does not read as tensors: {_first_line(error)}{hint}") from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not found:
        raise _error(reward, option, path, f"it holds a {type(found).__name__}, not tensors by name")
    strange = [name for name, value in found.items() if not isinstance(name, str) or not _is_plain(value)]
    if strange:
        raise _error(reward, option, path, f"what it holds as {_some(strange)} is no tensor of numbers")
    _check_finite(found, reward, option, path)
    return dict(found)


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor with a value of its own at each place: not quantised, not sparse, not without values."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not (value.is_quantized or value.is_meta)


def named_dtype(reward: str, name: str) -> torch.dtype:
    """The dtype of a name. Raises: RewardSpecError for another one than DTYPES has."""
    if name not in DTYPES:
        raise RewardSpecError(f"reward {reward!r} has dtype={name!r}; allowed are {', '.join(map(repr, DTYPES))}")
    return DTYPES[name]


def refuse(reward: str, option: str, place: str | Path, reason: str) -> RewardSpecError:
    """The error of a file that was read and does not fit, to be raised."""
    return _error(reward, option, place, reason)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' table of the weights that do not fit: those that matter are an error here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _check_finite(found: dict[str, Tensor], reward: str, option: str, place: str | Path) -> None:
    broken = [name for name, tensor in found.items() if not _is_finite(tensor)]
    if broken:
        raise _error(reward, option, place, f"{_some(broken)} holds NaN or inf: fetch it again, or convert it again")


def _is_finite(tensor: Tensor) -> bool:
    # The arithmetic of one byte's floats is not served.
    wide = tensor.float() if tensor.dtype.itemsize < 2 else tensor
    return not tensor.is_floating_point() or bool(wide.isfinite().all())


def _error(reward: str, option: str, place: str | Path, reason: str) -> RewardSpecError:
    return RewardSpecError(f"reward {reward!r} cannot load {option}={str(place)!r}: {reason}")


def _why(reward: str, option: str, place: str, error: Exception, what: str, revision: str | None) -> str:
    """What is wrong with a place that did not load, and what to do."""
    if os.path.exists(os.path.expanduser(place)):
        if isinstance(error, pickle.UnpicklingError):
            return f"its pickled weights hold more than tensors{_HOW_TO_CONVERT}"
        return f"no {what} came from it ({_first_line(error)}); {_put(reward, option)}"
    if not _is_hub_name(place):
        return f"there is no such folder; {_put(reward, option)}"
    causes = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    unreachable = any(isinstance(cause, LocalEntryNotFoundError) for cause in causes)
    reason = "the hub cannot be reached, and its cache does not hold it" if unreachable else _first_line(error)
    at = f" --revision {revision}" if revision else ""
    spared = "; HF_HUB_OFFLINE=1 spares its retries" if unreachable else ""
    return (
        f"there is no such folder here, and it did not come from the hub ({reason}{spared}). Without network: run "
        f"`hf download {place}{at} --local-dir FOLDER` on a machine with one, copy FOLDER here and "
        f"{_put(reward, option)}"
    )


def _put(reward: str, option: str) -> str:
    return f"set `reward.options: {{{reward}: {{{option}: FOLDER}}}}` to where it is"


def _is_hub_name(place: str) -> bool:
    try:
        validate_repo_id(place)
    except HFValidationError:
        return False
    return True


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].strip() or type(error).__name__


def _some(names: list, most: int = 3) -> str:
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
