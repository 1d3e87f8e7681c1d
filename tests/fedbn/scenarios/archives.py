"""Small files with the layout of the archives of downloaded recordings."""

from __future__ import annotations

import numpy as np

from fedbn.scenarios import harth, pamap2, wisdm
from fedbn.scenarios.recorded import GRAVITY
from fedbn.seeds import numpy_generator


def bouts(codes, rate, seconds, key=""):
    """Times, codes, and signals ``[n, 6]``: gravity along x, y or z, and a rotation of the position of the code."""
    n = round(seconds * rate)
    signal = numpy_generator(0, "bouts", str(rate), key).normal(0, 0.01, (n * len(codes), 6))
    for i in range(len(codes)):
        signal[i * n : (i + 1) * n, i % 3] += 1
        signal[i * n : (i + 1) * n, 3] += i
    return np.arange(n * len(codes)) / rate, np.repeat(codes, n), signal


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def join(values, separator, form=".4f"):
    return separator.join(format(v, form) for v in values)


def write_pamap2(directory, seconds):
    """Gravity is turned around in the units on hand and ankle; packets of the chest are lost for 0.05 s and 0.5 s."""
    for person in (101, 102):
        lines = []
        for i, (t, code, values) in enumerate(
            zip(*bouts([1, 0, 4, 24, *pamap2.ACTIVITIES], 100, seconds), strict=True)
        ):
            up, down = (join(sign * GRAVITY * values[:3], " ") for sign in (1, -1))
            rest = f"7.5 7.5 7.5 {join(values[3:], ' ')} 7.5 7.5 7.5 1 0 0 0"
            lost = 300 <= i < 305 or 400 <= i < 450
            chest = " ".join(["NaN"] * 17) if lost else f"34.5 {up} {rest}"
            lines.append(f"{t + 5.12:.2f} {code} NaN 30.5 {down} {rest} {chest} 33.5 {down} {rest}")
        write(directory / "Protocol" / f"subject{person}.dat", lines)


def write_harth(directory, seconds):
    """The thigh is turned around; one file numbers its rows."""
    for person, index in ((6, False), (8, True)):
        lines = ["index," * index + "timestamp,back_x,back_y,back_z,thigh_x,thigh_y,thigh_z,label"]
        for i, (t, code, values) in enumerate(zip(*bouts(list(harth.ACTIVITIES), 50, seconds), strict=True)):
            date = f"2019-01-12 00:{int(t) // 60:02d}:{int(t) % 60:02d}.{round(t % 1 * 1000):03d}"
            lines.append(f"{i}," * index + f"{date},{join(values[:3], ',')},{join(-values[:3], ',')},{code}")
        write(directory / f"S{person:03d}.csv", lines)


def write_wisdm(directory, seconds):
    """The times of both sensors differ by 7 ms."""
    times, codes, signal = bouts(list(wisdm.ACTIVITIES), 20, seconds)
    for person in (1600, 1601):
        for device in ("phone", "watch"):
            for sensor, values in (("accel", GRAVITY * signal[:, :3]), ("gyro", signal[:, 3:])):
                start = 252_207_666_810_782 + (7_000_000 if sensor == "gyro" else 0)
                rows = zip(times, codes, values, strict=True)
                lines = (f"{person},{code},{start + round(1e9 * t)},{join(v, ',')};" for t, code, v in rows)
                write(directory / "raw" / device / sensor / f"data_{person}_{sensor}_{device}.txt", lines)


def write_opportunity(directory, seconds):
    missing = " ".join(["NaN"] * 36)
    for person in (1, 2):
        for run in ("ADL1", "ADL2", "ADL3", "ADL4", "ADL5", "Drill"):
            lines = []
            for t, code, values in zip(*bouts([1, 2, 0, 4, 5], 30, seconds, f"{person} {run}"), strict=True):
                unit = f"{join(1000 * values, ' ', '.0f')} 0 0 0 1 0 0 0"
                others = " ".join(["NaN"] * 141)
                lines.append(f"{1000 * t:.0f} {missing} {' '.join([unit] * 5)} {others} {code} 0 0 0 0 0 0")
            write(directory / "dataset" / f"S{person}-{run}.dat", lines)


WRITERS = {"pamap2": write_pamap2, "harth": write_harth, "wisdm": write_wisdm, "opportunity": write_opportunity}
