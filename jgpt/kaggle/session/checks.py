"""Check what can be wrong with a session on Kaggle, and say how to fix it; for `jgpt.check_env`.

Beside the data path. Secrets are shown by name, never by value.
"""

import importlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from jgpt.checks import tpu
from jgpt.checks.verdict import Check
from jgpt.kaggle.session.limits import KEPT_GB
from jgpt.kaggle.session.machines import TPU, this_machine
from jgpt.kaggle.session.paths import input_dir, mounts, scratch_dir, working_dir
from jgpt.redaction import redact
from jgpt.run_dir.disk import bytes_below

TWO_T4S = (
    'kaggle kernels push --accelerator NvidiaTeslaT4, or "machine_shape": "NvidiaTeslaT4" in kernel-metadata.json, '
    "or in the editor: Settings > Accelerator > GPU T4 x2"
)
TPU_CHIPS = 8  # of the TPU v5e-8
A_TPU = (
    "push with --accelerator TpuV5E8 and without --docker_image: with an image of its own Kaggle gives a CPU instead "
    "(kaggle-cli issue 1197); or in the editor: Settings > Accelerator > TPU v5e-8"
)
INTERNET_ON = (
    'in the editor: Settings > Internet on (it needs a phone-verified account), or "enable_internet": true in '
    "kernel-metadata.json"
)
# The labels of secrets, as users name them.
LABELS = ("HF_TOKEN", "KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "WANDB_API_KEY")
LEAST_SCRATCH_GB = 5.0  # for token files, and one checkpoint to upload
IMAGE_FILES = ("/etc/git_commit", "/etc/build_date")  # which image this is, as Kaggle's Dockerfile writes it


def machine(online: bool | None) -> list[Check]:
    """Check the image, the disks, the internet (`online`; None: not tested) and what is mounted."""
    return [*image(), *disks(), *([] if online is None else internet(online)), *inputs()]


def accelerators(kinds: Sequence[str]) -> list[Check]:
    """Check that the accelerators that JAX sees, by their kinds, are the two T4s, or the TPU's eight chips."""
    chips = sum(kind.startswith("TPU") for kind in kinds)
    if chips == TPU_CHIPS:
        return [Check(tpu.CHIPS, "ok", f"all {chips} of the TPU v5e-8")]
    if chips:
        return [Check(tpu.CHIPS, "warn", f"{chips} of the {TPU_CHIPS} of a TPU v5e-8", A_TPU)]
    if this_machine() is TPU:
        return [Check(tpu.CHIPS, "FAIL", "none, and a TPU v5e-8 was asked for", A_TPU)]
    n_t4s = sum(kind.endswith("T4") for kind in kinds)
    if n_t4s == 2:
        return [Check("GPUs", "ok", "both T4s")]
    if n_t4s == 1:
        return [Check("GPUs", "warn", "one T4 of the two: half the speed", TWO_T4S)]
    return [Check("GPUs", "warn", f"{kinds[0] if kinds else 'none'}, not Kaggle's two T4s", TWO_T4S)]


def image() -> list[Check]:
    """Name the image, for a bug report, or to pin it as docker_image."""
    names = [f"{Path(name).name} {Path(name).read_text().strip()[:40]}" for name in IMAGE_FILES if Path(name).is_file()]
    return [Check("image", "ok", ", ".join(names)) if names else Check("image", "-", "unknown")]


def disks() -> list[Check]:
    """Check the working folder, of which 20 GB are kept, and scratch."""
    working, scratch = working_dir(), scratch_dir()
    if not os.access(working, os.W_OK):
        fix = "run on Kaggle, or set JGPT_KAGGLE_ROOT to a folder that imitates it"
        return [Check("working", "FAIL", f"cannot write to {working}", fix)]
    used = bytes_below(working) / 1e9
    left = min(KEPT_GB - used, shutil.disk_usage(working).free / 1e9)
    value = f"{left:.1f} GB left of the {KEPT_GB:g} that are kept, {used:.1f} GB used"
    fix = f"remove what is not needed from {working}: four checkpoints of 70 M parameters take 3.4 GB"
    checks = [Check("working", "ok", value) if left >= KEPT_GB / 4 else Check("working", "warn", value, fix)]
    free = shutil.disk_usage(scratch).free / 1e9
    value = f"{free:.1f} GB free at {scratch}"
    fix = "remove old files there: it is for token files, downloads, and checkpoints that are being uploaded"
    enough = free >= LEAST_SCRATCH_GB
    return [*checks, Check("scratch", "ok", value) if enough else Check("scratch", "warn", value, fix)]


def internet(online: bool) -> list[Check]:
    """Say what a session without internet can and cannot do."""
    if online:
        return [Check("internet", "ok", "on")]
    value = "off: fine for char, bpe and mounted tokenizers; models of the Hub, uploads and secrets need it"
    return [Check("internet", "warn", value, INTERNET_ON)]


def inputs() -> list[Check]:
    """List what is mounted, with its size."""
    mounted = mounts()
    if not mounted:
        fix = "in the editor: Add Input; or dataset_sources in kernel-metadata.json"
        return [Check("inputs", "warn", f"nothing is mounted below {input_dir()}", fix)]
    sizes = [f"{mount.relative_to(input_dir())} ({bytes_below(mount) / 1e6:,.1f} MB)" for mount in mounted]
    return [Check("inputs", "ok", ", ".join(sizes))]


def secrets(online: bool | None) -> list[Check]:
    """Check which of LABELS are attached to the notebook as secrets, the session token, and whose account it is."""
    token = os.environ.get("KAGGLE_API_V1_TOKEN", "")
    session = (
        Check("session token", "ok", "present") if Path(token).is_file() else Check("session token", "-", "absent")
    )
    return [*attached(online), session, *([whoami()] if online else [])]


def attached(online: bool | None) -> list[Check]:
    """Ask Kaggle for each of LABELS, and keep no value."""
    fix = "in the editor: Add-ons > Secrets, add it with that label and attach it; a push cannot attach it"
    if online is False:
        return [Check("secrets", "warn", "cannot be read: the internet is off", INTERNET_ON)]
    try:
        client = importlib.import_module("kaggle_secrets").UserSecretsClient()
    except Exception as error:  # no such package, no token of the session
        return [Check("secrets", "warn", f"cannot be read: {type(error).__name__}", fix)]
    labels = []
    for label in LABELS:
        try:
            client.get_secret(label)
            labels.append(label)
        except Exception:  # there is none, or it is not attached: errors of Kaggle's package or of the network
            continue
    if "HF_TOKEN" in labels:
        return [Check("secrets", "ok", f"attached: {', '.join(labels)}")]
    value = f"attached: {', '.join(labels) or 'none'}; without HF_TOKEN no gated model and no upload to the Hub"
    return [Check("secrets", "warn", value, fix)]


def whoami() -> Check:
    """Name the Kaggle account that uploads would use."""
    try:
        import kagglehub

        name = kagglehub.whoami(verbose=False)["username"]
    except Exception as error:  # not installed, refused, not reached
        fix = "uploads to Kaggle need credentials: the session's own, or the secret KAGGLE_API_TOKEN"
        return Check("Kaggle account", "warn", f"unknown: {redact(str(error)) or type(error).__name__}"[:200], fix)
    return Check("Kaggle account", "ok", name)
