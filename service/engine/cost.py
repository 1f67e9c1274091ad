"""CPU time and memory to decode an image, estimated from its header.

`python -m tests.benchmarks.decoding_cost` compares the estimates with measurements. A test compares the memory estimate
of every format, mode and shape with the measured peak.
"""

from __future__ import annotations

from dataclasses import dataclass

from camcal.models.headers import Header

FIXED_BYTES = 4 * 2**20  # buffers, strips and reduced pictures, for any image size
COPIES = {"WEBP": 7, "BMP": 1}  # in-memory copies of the file, or of its metadata
OTHER_COPIES = 3  # the same for the other formats
ORDINARY_SCANS = 20  # most scans of an ordinary progressive JPEG; encoders write about ten

# Nanoseconds on one core of an EPYC at 2.6 GHz.
PIXEL_NS, SAMPLE_NS = 12.0, 5.5  # not JPEG: per pixel, and per byte of uncompressed data
BYTE_NS = 9.0  # per byte of the file
JPEG_PIXEL_NS, OUTPUT_NS = 1.0, 11.0  # JPEG: per pixel of the file, and per pixel of the (reduced) output
SCAN_NS, EMPTY_SCAN_NS = 0.7, 2.5  # progressive JPEG: per scan and pixel, with up to ORDINARY_SCANS scans or with more


@dataclass(frozen=True, kw_only=True)
class Cost:
    """CPU time, and peak memory without the file itself."""

    cpu_s: float
    nbytes: int


def cost(header: Header, file_bytes: int, shrink: int = 1) -> Cost:
    """Estimate the cost to decode and resize an image.

    Args:
        header: the header of the file.
        file_bytes: the size of the file.
        shrink: the factor by which a JPEG is reduced during decoding.
    """
    if header.format == "JPEG":
        return _jpeg(header, file_bytes, shrink)
    alpha = header.channels in (2, 4)
    # The WebP decoder allocates two canvases with alpha besides the picture.
    pixel_bytes = (21 if alpha else 17) if header.format == "WEBP" else 10 if alpha else 8
    # BMP is not compressed. WebP takes as long as a PNG of the same size in bytes, GIF as long as a PNG with a palette.
    unpacking_ns = SAMPLE_NS * header.channels * header.depth / 8 * header.pixels + BYTE_NS * file_bytes
    cpu_ns = PIXEL_NS * header.pixels + (0 if header.format == "BMP" else unpacking_ns)
    copied = COPIES.get(header.format, OTHER_COPIES) * file_bytes
    return Cost(cpu_s=cpu_ns / 1e9, nbytes=pixel_bytes * header.pixels + copied + FIXED_BYTES)


def _jpeg(header: Header, file_bytes: int, shrink: int) -> Cost:
    output = header.pixels / shrink**2
    scan_ns = SCAN_NS if header.scans <= ORDINARY_SCANS else EMPTY_SCAN_NS
    scans_ns = scan_ns * header.scans * header.pixels if header.progressive else 0
    # Progressive JPEG keeps the coefficients of the full size in memory, even if the output is reduced.
    coefficients = 2 * header.channels * header.pixels if header.progressive else 0
    copied = OTHER_COPIES * file_bytes if header.odd else 0  # by Pillow; libjpeg-turbo's own interface copies nothing
    return Cost(
        cpu_s=(JPEG_PIXEL_NS * header.pixels + OUTPUT_NS * output + scans_ns + BYTE_NS * file_bytes) / 1e9,
        nbytes=int(10 * output) + coefficients + copied + FIXED_BYTES,
    )
