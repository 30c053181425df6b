"""The Mandelbrot set, row by row, in the colours of workers: `python mandelbrot.py picture.png`.

It runs by itself (4 workers), and with `mpirun -n 5 python mandelbrot.py picture.png`.
"""

import struct
import sys
import zlib

import numpy as np

import hpcdist
from hpcdist import myid, pmap

WIDTH, HEIGHT, DEEPEST = 480, 320, 100
COLOURS = [(255, 120, 60), (90, 160, 255), (120, 220, 110), (240, 200, 70), (200, 120, 230)]


def row(y: float) -> tuple[int, np.ndarray]:
    """Say who computes it, and how soon each point of a row has left the circle of radius 2."""
    c = np.linspace(-2.2, 0.8, WIDTH) + 1j * y
    z = np.zeros_like(c)
    steps = np.zeros(WIDTH)
    for _ in range(DEEPEST):
        inside = abs(z) <= 2
        z[inside] = z[inside] ** 2 + c[inside]
        steps[inside] += 1
    return myid(), steps


def png(pixels: np.ndarray) -> bytes:
    """Write a picture: rows of pixels of red, green and blue."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    height, width, _ = pixels.shape
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def main(file: str) -> None:
    hpcdist.init(4)
    rows = pmap(row, np.linspace(-1, 1, HEIGHT))
    colours = {pid: COLOURS[k % len(COLOURS)] for k, pid in enumerate(hpcdist.procs())}
    light = [
        np.where(steps < DEEPEST, 0.25 + (steps / DEEPEST) ** 0.5 * 0.75, 0.08) for _, steps in rows
    ]
    pixels = [np.outer(part, colours[pid]) for (pid, _), part in zip(rows, light, strict=True)]
    with open(file, "wb") as out:
        out.write(png(np.array(pixels).astype(np.uint8)))
    print(f"{HEIGHT} rows by {len({pid for pid, _ in rows})} processes")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["mandelbrot.png"])
