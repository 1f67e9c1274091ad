"""What decoding an image costs, estimated from its header: seconds of CPU and bytes of memory.

`python -m tests.benchmarks.decoding_cost` prints the estimates beside measurements. A test checks the memory of every
format, mode and shape against its measured peak.
"""

from __future__ import annotations

from dataclasses import dataclass

from camcal.models.headers import Header

FIXED_BYTES = 4 * 2**20  # buffers, strips and the small pictures, whatever the size of the image
COPIES = {"WEBP": 7, "BMP": 1}  # of the file, or of its parts that are not the picture,
OTHER_COPIES = 3  # and for the other formats
ORDINARY_SCANS = 20  # of a progressive JPEG: encoders write about ten

# Nanoseconds of one core of an EPYC at 2.6 GHz.
PIXEL_NS, SAMPLE_NS = 12.0, 5.5  # of a picture that is not a JPEG: each pixel, and each byte of it before it is packed
BYTE_NS = 9.0  # of any file
JPEG_PIXEL_NS, OUTPUT_NS = 1.0, 11.0  # each pixel of a JPEG, and each one that is left when it is decoded smaller
SCAN_NS, EMPTY_SCAN_NS = 0.7, 2.5  # each scan of each pixel: of about ten scans, or of very many


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of CPU, and bytes of memory at the peak, beside the file itself."""

    cpu_s: float
    nbytes: int


def cost(header: Header, file_bytes: int, shrink: int = 1) -> Cost:
    """What decoding and resizing the image of `header` costs.

    Args:
        header: of the file.
        file_bytes: its size.
        shrink: by how much a JPEG is reduced while it is decoded.
    """
    if header.format == "JPEG":
        return _jpeg(header, file_bytes, shrink)
    alpha = header.channels in (2, 4)
    # A WebP's decoder keeps two canvases with alpha beside the picture.
    pixel_bytes = (21 if alpha else 17) if header.format == "WEBP" else 10 if alpha else 8
    # A BMP is not packed. WebP takes as long as a PNG of as many bytes, GIF as a PNG with a palette.
    packed_ns = SAMPLE_NS * header.channels * header.depth / 8 * header.pixels + BYTE_NS * file_bytes
    cpu_ns = PIXEL_NS * header.pixels + (0 if header.format == "BMP" else packed_ns)
    copied = COPIES.get(header.format, OTHER_COPIES) * file_bytes
    return Cost(cpu_s=cpu_ns / 1e9, nbytes=pixel_bytes * header.pixels + copied + FIXED_BYTES)


def _jpeg(header: Header, file_bytes: int, shrink: int) -> Cost:
    output = header.pixels / shrink**2
    scan_ns = SCAN_NS if header.scans <= ORDINARY_SCANS else EMPTY_SCAN_NS
    scans_ns = scan_ns * header.scans * header.pixels if header.progressive else 0
    # The coefficients of several scans are kept for the full size, however small the picture becomes.
    coefficients = 2 * header.channels * header.pixels if header.progressive else 0
    copied = OTHER_COPIES * file_bytes if header.odd else 0  # by Pillow; libjpeg-turbo's own interface copies nothing
    return Cost(
        cpu_s=(JPEG_PIXEL_NS * header.pixels + OUTPUT_NS * output + scans_ns + BYTE_NS * file_bytes) / 1e9,
        nbytes=int(10 * output) + coefficients + copied + FIXED_BYTES,
    )
