"""The result of a run on the hub: what a user loads and reads, and never its checkpoints."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from rftcore.errors import UsageError
from rftcore.training.config import RunConfig

# By whole paths: the hub's "*" stands for slashes too, and checkpoints hold files of the same names.
UPLOADED = [
    "README.md",
    "config.yaml",
    "results.json",
    "pytorch_lora_weights.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
    "unet/*",
    "best/*",
    "before_after.png",
    "lora_scales.png",
    "samples/*.png",
]


def repository(config: RunConfig) -> str:
    """The repository's name: hub_model_id, or that of output_dir; without a slash it is the user's own."""
    return config.hub_model_id or Path(config.output_dir).resolve().name


def check(config: RunConfig) -> None:
    """Asked before the model is loaded: whether the result can be uploaded once it is there.

    Raises: UsageError for a name that the hub does not allow, and without a token that it knows and lets write.
    """
    if not config.push_to_hub:
        return
    try:
        validate_repo_id(repository(config))
    except HFValidationError as error:
        raise UsageError(f"hub_model_id={repository(config)!r}: {error}; give user/name") from error
    token = get_token()
    if token is None:
        raise UsageError(
            "push_to_hub=true needs a token of the hub, and there is none: run `hf auth login`, or set HF_TOKEN to one "
            "with write access (https://huggingface.co/settings/tokens), or set push_to_hub=false"
        )
    try:
        role = HfApi(token=token).whoami().get("auth", {}).get("accessToken", {}).get("role")
    except HfHubHTTPError as error:
        raise UsageError(
            f"push_to_hub=true, and the hub does not know the token ({_first_line(error)}); run `hf auth login` again, "
            "or set push_to_hub=false"
        ) from error
    except Exception as error:  # whatever the network raises
        raise UsageError(
            f"push_to_hub=true, and the hub cannot be reached ({_first_line(error)}); set push_to_hub=false, and upload "
            f"afterwards: {command(config)}"
        ) from error
    if role == "read":
        raise UsageError(
            "push_to_hub=true, and the token may only read; make one with write access "
            "(https://huggingface.co/settings/tokens), or set push_to_hub=false"
        )


def push(config: RunConfig) -> str:
    """Uploads what `output_dir` holds of UPLOADED, and says where to, or why not and how to do it by hand."""
    try:
        api = HfApi()
        name = api.create_repo(repository(config), exist_ok=True).repo_id
        api.upload_folder(
            repo_id=name,
            folder_path=config.output_dir,
            allow_patterns=UPLOADED,
            commit_message=f"Fine-tuned with rftcore ({config.algorithm})",
        )
    except Exception as error:  # noqa: BLE001  # whatever the hub or the network raises: the run itself is done
        return (
            f"not uploaded to the hub ({_first_line(error)}); everything is in {config.output_dir}. To upload it: "
            f"{command(config)}"
        )
    return f"uploaded to https://huggingface.co/{name}"


def command(config: RunConfig) -> str:
    """What uploads the same by hand."""
    patterns = " ".join(f"--include '{pattern}'" for pattern in UPLOADED)
    return f"hf upload {repository(config)} {config.output_dir} . {patterns}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
