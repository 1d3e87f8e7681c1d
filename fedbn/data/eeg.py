"""Read windows of EEG recordings: EDF, BDF and BrainVision through MNE-Python (optional), or NumPy archives.

Gramfort et al., *MEG and EEG data analysis with MNE-Python*, Frontiers in Neuroscience 7 (2013) 267,
https://mne.tools
"""

from __future__ import annotations

import importlib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedbn.data.windows import hop, windows
from fedbn.errors import UserError, install_extra, unknown

NUMPY = ".npz"
READERS = {".edf": "read_raw_edf", ".bdf": "read_raw_bdf", ".vhdr": "read_raw_brainvision"}


def read_windows(
    path: str | Path, channels: Sequence[str], seconds: float, overlap: float = 0.0
) -> tuple[Tensor, float]:
    """Cut a recording into windows.

    Args:
        path: an EDF or BDF file, the header (``.vhdr``) of a BrainVision recording, or a NumPy archive (``.npz``) with
            ``signal`` ``[channels, samples]`` in microvolts, ``rate`` in Hz and the names ``channels``.
        channels: names of the channels, in the order of the output.
        seconds: length of a window.
        overlap: fraction of a window that overlaps with the next one, in [0, 1).

    Returns:
        Windows ``[n, channels, samples]`` in microvolts, float32, and the sampling rate in Hz.

    Raises:
        UserError: if MNE is not installed, the file or a channel does not exist, or the format is not supported.
    """
    path = Path(path)
    suffixes = (*READERS, NUMPY)
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{path.name}: not one of {', '.join(suffixes)}; export the recording as EDF")
    if not path.is_file():
        raise UserError(f"no recording at {path}; check the path")
    signal, rate = (_read_archive if path.suffix.lower() == NUMPY else _read_mne)(path, channels)
    length = round(seconds * rate)
    if len(signal) < length:
        raise UserError(f"{path.name} lasts {len(signal) / rate:.1f} s: choose shorter windows")
    return windows(torch.from_numpy(signal.astype(np.float32)), length, hop(length, overlap)), rate


def _read_mne(path: Path, channels: Sequence[str]) -> tuple[np.ndarray, float]:
    """Read a file with MNE: signal ``[samples, channels]`` in microvolts, and sampling rate."""
    try:
        io = importlib.import_module("mne.io")
    except ImportError:
        raise UserError("reading EEG files needs MNE-Python: " + install_extra("eeg")) from None
    try:
        raw = getattr(io, READERS[path.suffix.lower()])(path, verbose="error")
    except Exception as error:
        # A damaged file can make MNE's readers raise any exception.
        raise UserError(f"MNE cannot read {path.name} ({type(error).__name__}: {error}): export it again") from error
    _check_channels(path, channels, raw.ch_names)
    return 1e6 * np.stack([raw.get_data(picks=[name])[0] for name in channels], axis=1), float(raw.info["sfreq"])


def _read_archive(path: Path, channels: Sequence[str]) -> tuple[np.ndarray, float]:
    """Read a NumPy archive: signal ``[samples, channels]`` in microvolts, and sampling rate."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            signal, rate = np.asarray(arrays["signal"], np.float64), float(arrays["rate"])
            names = [str(name) for name in arrays["channels"]]
    except (OSError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path.name} must hold signal [channels, samples] in microvolts, rate in Hz and channels (names), as "
            f"plain arrays ({error}): np.savez({path.name!r}, signal=..., rate=..., channels=[...])"
        ) from error
    if signal.ndim != 2 or len(signal) != len(names) or not rate > 0 or not np.isfinite(signal).all():
        raise UserError(
            f"{path.name}: signal {list(signal.shape)} at {rate:g} Hz does not fit {len(names)} channels, or is not "
            "finite: save [channels, samples] in the order of the names"
        )
    _check_channels(path, channels, names)
    return signal[[names.index(name) for name in channels]].T, rate


def _check_channels(path: Path, channels: Sequence[str], names: Sequence[str]) -> None:
    for name in channels:
        if name not in names:
            raise unknown(f"channel of {path.name}", name, names)
