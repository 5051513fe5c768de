"""What comes out of an image file, and which files are refused."""

import os
import re
import socket
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import PEAK, TINY, assert_one_message, run_process, write_image

from mobilenet_ext.cli import main
from mobilenet_ext.train import EvalTransform, ImageFolder, ImageLoader, UnreadableImage, decoding
from mobilenet_ext.train.decoding import MAX_ASPECT, MAX_FILE_BYTES, decode_image

pil = pytest.importorskip("PIL.Image", reason="reads and writes the images")

RAMP = np.linspace(0, 65535, 60 * 50).astype(np.uint16).reshape(60, 50)


def png(width: int, height: int, samples: bytes = b"", bits: int = 8, channels: int = 1) -> bytes:
    """A PNG; without ``samples`` it ends where its pixels begin."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, {1: 0, 3: 2}[channels], 0, 0, 0)
    row = width * channels * bits // 8
    rows = b"".join(b"\0" + samples[start : start + row] for start in range(0, len(samples), row))
    end = chunk(b"IEND", b"") if samples else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + end


def tiff(samples: bytes, **tags: int) -> bytes:
    """A little-endian TIFF of one strip of grey samples, uncompressed."""
    numbers = {"width": 256, "height": 257, "bits": 258, "photometric": 262, "rows": 278}
    entries = {numbers[name]: value for name, value in tags.items()} | {259: 1, 277: 1, 279: len(samples)}
    start = 8 + 2 + 12 * (len(entries) + 1) + 4
    entries[273] = start
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    return b"II" + struct.pack("<HIH", 42, 8, len(entries)) + rows + bytes(4) + samples


def noise(mode: str, seed: int = 0) -> np.ndarray:
    shape = (60, 50, len(mode)) if len(mode) > 1 else (60, 50)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def assert_refused(path: Path, why: str) -> None:
    with pytest.raises(UnreadableImage, match=why) as caught:
        decode_image(path)
    assert caught.value.path == str(path)


def assert_grey(image: torch.Tensor, expected: np.ndarray) -> None:
    assert torch.equal(image, torch.from_numpy(expected.astype(np.uint8)).expand(3, -1, -1))


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "big-endian.tif", "grey.pgm", "lzw.tif"])
def test_of_16_bit_grey_the_high_byte_is_taken(tmp_path: Path, name: str) -> None:
    samples = RAMP.astype(">u2") if name == "big-endian.tif" else RAMP
    options = {"compression": "tiff_lzw"} if name == "lzw.tif" else {}
    pil.fromarray(samples).save(tmp_path / name, **options)
    assert_grey(decode_image(tmp_path / name), RAMP >> 8)


def test_16_bit_grey_is_as_bright_as_the_same_picture_in_16_bit_colour(tmp_path: Path) -> None:
    colours = np.stack([RAMP] * 3, axis=-1).astype(">u2")
    (tmp_path / "grey.png").write_bytes(png(50, 60, RAMP.astype(">u2").tobytes(), bits=16))
    (tmp_path / "colour.png").write_bytes(png(50, 60, colours.tobytes(), bits=16, channels=3))
    assert torch.equal(decode_image(tmp_path / "grey.png"), decode_image(tmp_path / "colour.png"))


def test_greys_of_10_and_12_bits_and_with_zero_for_white(tmp_path: Path) -> None:
    (tmp_path / "10.pgm").write_bytes(b"P5\n50 60\n1023\n" + (RAMP >> 6).astype(">u2").tobytes())
    brightest, darkest = decode_image(tmp_path / "10.pgm")[0, -1, -1], decode_image(tmp_path / "10.pgm")[0, 0, 0]
    assert (int(brightest), int(darkest)) == (255, 0)
    values = np.array([[0, 100, 1000, 2000], [3000, 4000, 4095, 17]])
    packed = int("".join(f"{value:012b}" for value in values.flat), 2).to_bytes(12, "big")
    (tmp_path / "12.tif").write_bytes(tiff(packed, width=4, height=2, rows=2, bits=12, photometric=1))
    assert_grey(decode_image(tmp_path / "12.tif"), values >> 4)
    inverted = tiff(RAMP.astype("<u2").tobytes(), width=50, height=60, rows=60, bits=16, photometric=0)
    (tmp_path / "white-is-zero.tif").write_bytes(inverted)
    assert_grey(decode_image(tmp_path / "white-is-zero.tif"), 255 - (RAMP >> 8))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_samples_of_32_bits_are_refused(tmp_path: Path, dtype: type) -> None:
    pil.fromarray(RAMP.astype(dtype)).save(tmp_path / "image.tif")
    assert_refused(tmp_path / "image.tif", "samples of 32 bits .*: expected 8 or 16")


@pytest.mark.parametrize("name", ["L.png", "L.bmp", "LA.png", "RGBA.png", "RGBA.tif", "1.png", "P.png", "P.gif"])
def test_grey_transparent_and_palette_images_become_rgb(tmp_path: Path, name: str) -> None:
    mode = name.partition(".")[0]
    if mode in ("1", "P"):
        image = pil.fromarray(noise("RGB")).convert(mode)
        expected = np.asarray(image.convert("RGB"))
    else:
        pixels = noise(mode)
        image = pil.fromarray(pixels, mode)
        expected = pixels[..., :3] if mode == "RGBA" else np.repeat(np.atleast_3d(pixels)[..., :1], 3, axis=-1)
    image.save(tmp_path / name)
    decoded = decode_image(tmp_path / name)
    assert torch.equal(decoded, torch.from_numpy(expected.copy()).permute(2, 0, 1))
    assert decoded.is_contiguous() is False and decoded.permute(1, 2, 0).is_contiguous()


def test_a_transparent_palette_gives_its_colours_without_a_warning(tmp_path: Path) -> None:
    image = pil.fromarray(noise("RGB")).convert("P")
    image.save(tmp_path / "image.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode_image(tmp_path / "image.png")
    assert torch.equal(decoded, torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1))


@pytest.mark.parametrize("name", ["image.jpg", "cmyk.jpg", "image.webp", "image.tif"])
def test_pixels_are_pillows_also_of_images_of_many_rows(tmp_path: Path, name: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (decoding.STRIP_ROWS * 2 + 7, 31, 3), dtype=np.uint8)
    pil.fromarray(pixels).convert("CMYK" if name == "cmyk.jpg" else "RGB").save(tmp_path / name)
    expected = np.array(pil.open(tmp_path / name).convert("RGB"))
    assert torch.equal(decode_image(tmp_path / name), torch.from_numpy(expected).permute(2, 0, 1))


@pytest.mark.parametrize("name", ["image.gif", "image.tif", "image.png", "image.webp"])
def test_of_several_images_in_a_file_the_first_is_taken(tmp_path: Path, name: str) -> None:
    first, second = (pil.new("RGB", (50, 60), colour) for colour in ((200, 0, 0), (0, 0, 200)))
    first.save(tmp_path / name, save_all=True, append_images=[second])
    red, _, blue = decode_image(tmp_path / name).float().mean(dim=(1, 2)).tolist()
    assert red > 190 and blue < 10


def test_a_photographs_orientation_is_left_as_torchvision_leaves_it(tmp_path: Path) -> None:
    turned = pil.Exif()
    turned[0x0112] = 6
    pil.fromarray(noise("RGB")).save(tmp_path / "image.jpg", exif=turned)
    assert decode_image(tmp_path / "image.jpg").shape == (3, 60, 50)


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path, deadline: None) -> None:
    os.mkfifo(tmp_path / "x.png")
    assert_refused(tmp_path / "x.png", "not a file but a FIFO")


def test_sockets_devices_and_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        assert_refused(Path("socket.png"), "not a file but a socket")
    Path("device.png").symlink_to("/dev/zero")
    assert_refused(Path("device.png"), "not a file but a device")
    Path("folder.png").mkdir()
    assert_refused(Path("folder.png"), "not a file but a folder")


def test_missing_and_empty_files_and_links_in_circles_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.png").touch()
    assert_refused(Path("empty.png"), "empty file")
    assert_refused(Path("missing.png"), "No such file")
    Path("a.png").symlink_to("b.png")
    Path("b.png").symlink_to("a.png")
    assert_refused(Path("a.png"), "Too many levels of symbolic links")


def test_a_closed_file_is_refused(images: Path, request: pytest.FixtureRequest) -> None:
    path = images.relative_to(images.parent) / "train" / "dark" / "00.jpg"
    (images.parent / path).chmod(0)
    request.getfixturevalue("not_root")
    assert_refused(path, "Permission denied")


@pytest.mark.parametrize("size", [(20000, 1), (1, 65535), (3, 301), (30001, 300)])
def test_an_image_that_is_nearly_a_line_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    pil.new("1", size).save(tmp_path / "line.png")
    assert_refused(tmp_path / "line.png", f"{size[0]}x{size[1]} pixels: expected one side at most {MAX_ASPECT} times")


def test_a_narrow_image_is_taken(tmp_path: Path) -> None:
    pil.new("L", (3, 300)).save(tmp_path / "narrow.png")
    assert EvalTransform(256, 224)(decode_image(tmp_path / "narrow.png")).shape == (3, 224, 224)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9460, 13000, 60000])
def test_too_many_pixels_are_refused_by_the_header_alone(tmp_path: Path, side: int) -> None:
    (tmp_path / "bomb.png").write_bytes(png(side, side))
    assert_refused(tmp_path / "bomb.png", "limit of" if side == 60000 else rf"{side}x{side} pixels: expected at most")


def test_the_limit_of_pixels_is_pillows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pil.new("L", (40, 30)).save(tmp_path / "image.png")
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", pil.DecompressionBombWarning)
        patch.setattr(pil, "MAX_IMAGE_PIXELS", 1199)
        assert_refused(tmp_path / "image.png", "40x30 pixels: expected at most 1,199")
    monkeypatch.setattr(pil, "MAX_IMAGE_PIXELS", None)
    assert decode_image(tmp_path / "image.png").shape == (3, 30, 40)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    """A text chunk of 1 GiB, which Pillow would read whole, in a file with a hole."""
    (tmp_path / "text.png").write_bytes(png(40, 30)[:33] + struct.pack(">I", 2**30) + b"tEXt")
    os.truncate(tmp_path / "text.png", 2**30 + 2**20)
    assert_refused(tmp_path / "text.png", f"bytes: expected at most {MAX_FILE_BYTES:,}")


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's figures of a process")
def test_decoding_takes_seven_bytes_a_pixel(tmp_path: Path) -> None:
    pil.new("RGB", (5000, 6000)).save(tmp_path / "large.bmp")
    pil.new("RGB", (5, 6)).save(tmp_path / "small.bmp")
    script = PEAK + (
        "from mobilenet_ext.train.decoding import decode_image\n"
        "decode_image('small.bmp'); before = peak(); decode_image('large.bmp'); print(peak() - before)"
    )
    result = run_process([sys.executable, "-c", script], tmp_path)
    assert 3 < int(result.stdout) / 30e6 < 8, result


def test_a_file_that_another_program_would_draw_is_refused(tmp_path: Path) -> None:
    pil.new("RGB", (40, 30)).save(tmp_path / "image.eps")
    (tmp_path / "image.eps").rename(tmp_path / "image.png")
    assert_refused(tmp_path / "image.png", "EPS")


@pytest.mark.parametrize("ending", ["jpg", "png", "bmp", "webp", "ppm", "tif", "gif"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_files_of_every_format_are_refused(tmp_path: Path, ending: str, share: float) -> None:
    path = tmp_path / f"image.{ending}"
    pil.fromarray(noise("RGB")).save(path)
    os.truncate(path, int(path.stat().st_size * share))
    assert_refused(path, ".")


def test_too_little_memory_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    write_image(tmp_path / "image.png", 0)
    monkeypatch.setattr(decoding.np, "empty", no_memory)
    with pytest.raises(MemoryError, match=str(tmp_path / "image.png")):
        decode_image(tmp_path / "image.png")


@pytest.fixture
def strange(images: Path) -> tuple[Path, list[str]]:
    """An image folder with training images that cannot be used, and these."""
    folder = images / "train" / "dark"
    pil.new("1", (20000, 1)).save(folder / "line.png")
    pil.fromarray(RAMP.astype(np.float32)).save(folder / "float.tif")
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to("nowhere")
    return images, sorted(str(folder / name) for name in ("line.png", "float.tif", "pipe.png", "link.png"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_leaves_them_out_and_names_them(strange: tuple[Path, list[str]], workers: int, deadline: None) -> None:
    root, paths = strange
    named: list[UnreadableImage] = []
    loader = ImageLoader(
        ImageFolder(root / "train"), EvalTransform(40, 32), batch_size=4, workers=workers, on_unreadable=named.append
    )
    assert sum(len(labels) for _, labels in loader) == 24
    assert sorted(image.path for image in named) == paths


def test_another_loaders_worker_names_the_file(strange: tuple[Path, list[str]], deadline: None) -> None:
    folder = ImageFolder(strange[0] / "train", transform=EvalTransform(40, 32))
    loader = torch.utils.data.DataLoader(folder, batch_size=4, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(RuntimeError, match=r"UnreadableImage: .*dark/float\.tif \(samples of 32 bits"):
        list(loader)


def test_training_skips_or_refuses_them_by_name(strange: tuple[Path, list[str]], tmp_path: Path) -> None:
    root, paths = strange
    train = [sys.executable, "-m", "mobilenet_ext", "train", *TINY, "--data", str(root), "--epochs", "1"]
    assert_one_message(run_process([*train, "--corrupt", "refuse"], tmp_path), "unreadable images", *paths)
    result = run_process([*train, "--out", "run"], tmp_path)
    assert result.returncode == 0 and all(result.stderr.count(path) == 1 for path in paths), result


def test_prediction_names_them(
    strange: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], deadline: None
) -> None:
    root, paths = strange
    assert main(["train", *TINY, "--data", str(root), "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    checkpoint = str(tmp_path / "run" / "last.pt")
    assert main(["predict", checkpoint, *paths, str(root / "train" / "dark" / "00.jpg"), "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert re.findall(r"cannot read the image (\S+) \(", captured.err) == paths
    assert captured.out.startswith(str(root / "train" / "dark" / "00.jpg"))


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """A file name is bytes; it comes out of every command as it is."""
    data = os.fsencode(tmp_path) + b"/da\xeft"
    for split in (b"train", b"val"):
        for number, name in enumerate((b"caf\xe9", b"dark")):
            write_image(Path(os.fsdecode(b"/".join([data, split, name, b"\xff.png"]))), number)
    broken = Path(os.fsdecode(data + b"/train/dark/\xfe.png"))
    broken.write_text("not an image")
    environment = {
        **os.environ,
        "PYTHONIOENCODING": "utf-8:strict",
        "PYTHONPATH": os.path.dirname(decoding.__file__) + "/../..",
    }

    def run(*arguments: object) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "mobilenet_ext", *map(os.fsencode, arguments), b"--device", b"cpu"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120, check=False)

    trained = run("train", *TINY[:-2], "--data", data, "--epochs", "1", "--out", "run")
    assert trained.returncode == 0 and rb"\udcfe.png (not an image" in trained.stderr
    measured = run("eval", "run/last.pt", "--workers", "0")
    assert measured.returncode == 0 and b"\ncaf\xe9 " in measured.stdout, measured
    image = data + b"/val/dark/\xff.png"
    predicted = run("predict", "run/last.pt", image)
    assert predicted.returncode == 0 and predicted.stdout.startswith(image + b"\n"), predicted
