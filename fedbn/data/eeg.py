"""Windows of a user's own EEG recordings (EDF, BDF, BrainVision), read by MNE-Python, an optional extra.

Gramfort et al., *MEG and EEG data analysis with MNE-Python*, Frontiers in Neuroscience 7 (2013) 267,
https://mne.tools
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedbn.data.windows import hop, windows
from fedbn.errors import UserError, unknown

READERS = {".edf": "read_raw_edf", ".bdf": "read_raw_bdf", ".vhdr": "read_raw_brainvision"}


def read_windows(
    path: str | Path, channels: Sequence[str], seconds: float, overlap: float = 0.0
) -> tuple[Tensor, float]:
    """Cut a recording into windows.

    Args:
        path: an EDF or BDF file, or the header (``.vhdr``) of a BrainVision recording.
        channels: names of the channels, in the order wanted.
        seconds: length of a window.
        overlap: share of a window that the next one repeats, 0 to below 1.

    Returns:
        Windows ``[n, channels, samples]`` in microvolts, float32, and the sampling rate in Hz.

    Raises:
        UserError: MNE is not installed, or the file, its format or a channel does not exist.
    """
    path = Path(path)
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path.name}: not one of {', '.join(READERS)}; export the recording as EDF")
    if not path.is_file():
        raise UserError(f"no recording at {path}")
    try:
        io = importlib.import_module("mne.io")
    except ImportError:
        raise UserError("EEG files are read with MNE-Python: pip install 'fedbn[eeg]' (or pip install mne)") from None
    raw = getattr(io, READERS[path.suffix.lower()])(path, verbose="error")
    for name in channels:
        if name not in raw.ch_names:
            raise unknown(f"channel of {path.name}", name, raw.ch_names)
    rate = float(raw.info["sfreq"])
    signal = 1e6 * np.stack([raw.get_data(picks=[name])[0] for name in channels], axis=1)
    length = round(seconds * rate)
    if len(signal) < length:
        raise UserError(f"{path.name} lasts {len(signal) / rate:.1f} s: choose windows of at most that")
    return windows(torch.from_numpy(signal.astype(np.float32)), length, hop(length, overlap)), rate
