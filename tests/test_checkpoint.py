"""Checkpoint folders: what is written comes back, and everything wrong is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from endside.checkpoint import INDEX, MANIFEST, Checkpoint, resolve, write_folder
from endside.errors import UserError
from endside.shards import NUMPY, TensorSource

CONFIG = {"config.json": b'{"model_type": "llama"}\n'}


def arrays() -> dict[str, tuple[str, np.ndarray]]:
    """Odd sizes, several item sizes, an empty tensor and a scalar."""
    draw = np.random.default_rng(3)
    return {
        "a.weight": ("BF16", draw.integers(0, 1 << 16, (3, 5), dtype=np.uint16)),
        "b.weight": ("F32", draw.standard_normal((7,), dtype=np.float32)),
        "c.weight": ("U8", draw.integers(0, 255, (63,), dtype=np.uint8)),
        "d.scale": ("F64", np.array(1.5)),
        "e.none": ("F16", np.zeros((0, 4), np.float16)),
    }


def write(folder: Path, **options: object) -> Path:
    """The tensors above as a checkpoint folder."""
    sources = {
        name: TensorSource(dtype, array.shape, lambda array=array: array)
        for name, (dtype, array) in arrays().items()
    }
    return write_folder(folder, sources, CONFIG, **options)


def patch_header(path: Path, change: Callable[[dict], None]) -> None:
    """Rewrite a file with a changed header."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def refused(folder: Path, *words: str) -> None:
    """Opening fails with one message that holds every word and a fix."""
    with pytest.raises(UserError) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    for word in (*words, "export"):
        assert word in message, f"{word!r} is not in: {message}"
    assert "\n" not in message


@pytest.mark.parametrize("max_shard", [10**9, 40])
def test_tensors_come_back(tmp_path: Path, max_shard: int) -> None:
    """Every dtype and shape, in one file and in shards, by numpy, by torch and by safetensors."""
    folder = write(tmp_path / "m", max_shard=max_shard)
    checkpoint = Checkpoint.open(folder)
    assert len(list(folder.glob("*.safetensors"))) == (1 if max_shard == 10**9 else 4)
    assert sorted(checkpoint.names()) == sorted(arrays())
    for name, (dtype, array) in arrays().items():
        info = checkpoint.info(name)
        assert (info.dtype, info.shape) == (dtype, array.shape)
        got = checkpoint.numpy(name)
        assert got.dtype == array.dtype and np.array_equal(got, array)
        assert info.start % array.itemsize == 0, "not aligned to its item size"


def test_safetensors_and_torch_agree(tmp_path: Path) -> None:
    """The reference reader sees the same tensors, and ours gives torch the same dtypes."""
    torch = pytest.importorskip("torch")
    from safetensors import safe_open

    folder = write(tmp_path / "m")
    checkpoint = Checkpoint.open(folder)
    with safe_open(folder / "model.safetensors", framework="pt") as peer:
        assert sorted(peer.keys()) == sorted(arrays())
        for name in peer.keys():  # noqa: SIM118 (not a dict)
            want, got = peer.get_tensor(name), checkpoint.torch(name)
            assert got.dtype == want.dtype and got.shape == want.shape
            bits = [tensor.reshape(-1).view(torch.uint8) for tensor in (got, want)]
            assert torch.equal(*bits)
    assert checkpoint.torch("d.scale").item() == 1.5


def test_mapped_tensors_are_private(tmp_path: Path) -> None:
    """Writing into a mapped tensor (training does) never reaches the file."""
    folder = write(tmp_path / "m")
    before = (folder / "model.safetensors").read_bytes()
    Checkpoint.open(folder).numpy("b.weight")[:] = 9
    assert (folder / "model.safetensors").read_bytes() == before
    assert np.array_equal(Checkpoint.open(folder).numpy("b.weight"), arrays()["b.weight"][1])


def test_unaligned_tensors_are_read(tmp_path: Path) -> None:
    """A foreign file may start a float at an odd byte."""
    data = b"\x07" + np.float32([1.25, -2]).tobytes()
    header = {
        "odd": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "x": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (tmp_path / "config.json").write_bytes(b"{}")
    got = Checkpoint.open(tmp_path).numpy("x")
    assert got.flags.aligned and got.tolist() == [1.25, -2]


@pytest.mark.parametrize("max_shard", [10**9, 40])
def test_bytes_are_deterministic(tmp_path: Path, max_shard: int) -> None:
    one, two = (
        write(tmp_path / "1", max_shard=max_shard),
        write(tmp_path / "2", max_shard=max_shard),
    )
    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in two.iterdir()) and MANIFEST in names
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


# Every way a weight file can be wrong.


@pytest.mark.parametrize("name", ["a.weight", "b.weight", "c.weight"])
def test_a_flipped_byte_is_found(tmp_path: Path, name: str) -> None:
    """The manifest knows, and the message names the file and the one damaged tensor."""
    folder = write(tmp_path / "m")
    info = Checkpoint.open(folder).info(name)
    with (folder / info.file).open("r+b") as file:
        file.seek(info.start + info.nbytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))
    refused(folder, info.file, f"damaged: tensor {name})", "download")
    assert Checkpoint.open(folder, verify=False).names(), "verify=False reads structure only"


def test_edited_text_is_logged_not_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Adding sparse_config to config.json is normal use."""
    folder = write(tmp_path / "m")
    (folder / "config.json").write_text('{"model_type": "llama", "sparse_config": {}}')
    assert "sparse_config" in Checkpoint.open(folder).config
    assert "config.json" in caplog.text and "not what was written" in caplog.text


@pytest.mark.parametrize("left", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, left: int) -> None:
    path = write(tmp_path / "m") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    refused(path.parent, "model.safetensors", "truncated", "tensor")


def test_truncation_names_the_first_tensor_lost(tmp_path: Path) -> None:
    path = write(tmp_path / "m") / "model.safetensors"
    info = Checkpoint.open(path.parent).info("a.weight")
    path.write_bytes(path.read_bytes()[: info.start + 1])
    refused(path.parent, "truncated", "tensor a.weight")


def test_trailing_bytes_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m") / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"xyz")
    refused(path.parent, "model.safetensors", "3 bytes after its last tensor c.weight")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h["b.weight"].update(dtype="F31"), ["b.weight", "unknown dtype 'F31'"]),
        (lambda h: h["b.weight"].update(shape=[8]), ["b.weight", "needs 32 bytes", "28"]),
        (lambda h: h["b.weight"].update(shape=[-7]), ["b.weight", "-7"]),
        (lambda h: h["b.weight"].update(shape="7"), ["b.weight", "shape"]),
        (lambda h: h["b.weight"].update(shape=[True, 7]), ["b.weight", "shape"]),
        (lambda h: h["b.weight"].pop("shape"), ["b.weight", "lacks"]),
        (lambda h: h["a.weight"].update(data_offsets=[37, 67]), ["a.weight", "starts at byte 37"]),
        (lambda h: h.update({"b.weight": 3}), ["b.weight", "lacks"]),
        (lambda h: h.pop("c.weight"), ["63 bytes after its last tensor e.none"]),
    ],
)
def test_a_wrong_header_is_refused(tmp_path: Path, change: Callable, words: list[str]) -> None:
    path = write(tmp_path / "m") / "model.safetensors"
    patch_header(path, change)
    refused(path.parent, "model.safetensors", *words)


@pytest.mark.parametrize(
    "header", [b'{"a": ', b"[1, 2]", b'{"a": {}, "a": {}}', b"\xff\xfe{}", b"null "]
)
def test_a_header_that_is_no_header_is_refused(tmp_path: Path, header: bytes) -> None:
    path = write(tmp_path / "m") / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    refused(path.parent, "model.safetensors", "damaged")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", max_shard=40)
    (folder / "model-00002-of-00004.safetensors").unlink()
    refused(folder, "model-00002-of-00004.safetensors is missing", "tensor b.weight", "download")


def edit_index(folder: Path, change: Callable[[dict], None]) -> None:
    """Change the weight map of the index."""
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


FIRST = "model-00001-of-00004.safetensors"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update({"z.weight": FIRST}), [FIRST, "z.weight", "does not hold"]),
        (lambda m: m.pop("e.none"), ["e.none", "no file"]),
        (lambda m: m.update({"b.weight": FIRST}), ["b.weight", FIRST]),
        (lambda m: m.update({"b.weight": "../x.safetensors"}), ["../x.safetensors"]),
        (lambda m: m.update({"b.weight": "x.bin"}), ["x.bin", "no shard"]),
        (lambda m: m.update({"b.weight": 3}), ["weight_map"]),
    ],
)
def test_index_and_shards_must_agree(tmp_path: Path, change: Callable, words: list[str]) -> None:
    folder = write(tmp_path / "m", max_shard=40)
    edit_index(folder, change)
    refused(folder, INDEX, *words)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "x.safetensors")
    shutil.copy(folder / "x.safetensors", folder / "y.safetensors")
    (folder / MANIFEST).unlink()
    refused(folder, "x.safetensors", "again in y.safetensors", "remove")


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff", b""])
def test_a_damaged_config_is_refused(tmp_path: Path, text: bytes) -> None:
    folder = write(tmp_path / "m")
    (folder / "config.json").write_bytes(text)
    refused(folder, "config.json")


def test_require_lists_everything_at_once(tmp_path: Path) -> None:
    """Missing, differing and unexpected tensors, with their files, in one message."""
    checkpoint = Checkpoint.open(write(tmp_path / "m"))
    expected = {
        "a.weight": (5, 3),
        "b.weight": (7,),
        "n.weight": (1,),
        "d.scale": (),
        "e.none": (0, 4),
    }
    with pytest.raises(UserError) as caught:
        checkpoint.require(expected)
    message = str(caught.value)
    for words in (
        "tensor n.weight missing",
        "a.weight in model.safetensors is [3, 5] but the configuration asks for [5, 3]",
        "c.weight in model.safetensors not expected",
        str(checkpoint.folder),
    ):
        assert words in message
    assert "b.weight" not in message


def test_an_unknown_tensor_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tensor a.wieght; nearest is a.weight"):
        Checkpoint.open(write(tmp_path / "m")).info("a.wieght")


# What MODEL may be.


def test_pickles_and_other_files_are_refused(tmp_path: Path) -> None:
    """The reason and the way out, for a file and for a folder that holds only such files."""
    for name, words in {
        "pytorch_model.bin": "pickle file.*safe_serialization",
        "model.pt": "pickle file.*safetensors only",
        "model.pth": "pickle",
        "m.gguf": "GGUF file.*convert m.gguf DIR",
        "model.safetensors": "single file.*folder",
    }.items():
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match=words):
            resolve(tmp_path / name)
        (tmp_path / name).unlink()
    (tmp_path / "config.json").write_text("{}")
    for name, words in {
        "a.bin": "pickle.*re-save",
        "a.gguf": "give the .gguf file itself",
        "a.txt": "no .*weights",
    }.items():
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match=words):
            resolve(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    "name", ["/nowhere/at/all", "./nowhere", "a b/c", "one", "../x/y", "x.gguf"]
)
def test_a_name_that_is_nothing_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="check the spelling of MODEL"):
        resolve(name)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model folder, config\.json is missing"):
        resolve(tmp_path)


def test_a_model_folder_is_itself(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    assert resolve(folder) == folder and resolve(str(folder)) == folder


def test_a_hub_name_is_downloaded_without_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own library is asked for json, safetensors and tokenizer files only."""
    hub = pytest.importorskip("huggingface_hub")
    from fnmatch import fnmatch

    folder, asked = write(tmp_path / "snapshot"), {}

    def download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.update(name=name, allow=allow_patterns)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve("openbmb/MiniCPM4-0.5B") == folder
    assert asked["name"] == "openbmb/MiniCPM4-0.5B"

    def wanted(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in asked["allow"])

    assert all(map(wanted, ("a-1-of-2.safetensors", INDEX, "tokenizer.model", "chat.jinja")))
    assert not any(map(wanted, ("pytorch_model.bin", "model.pt", "model.gguf", "modeling.py")))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("LocalEntryNotFoundError", "cannot be reached nor is it cached: check the network"),
        ("OfflineModeIsEnabled", "could not be downloaded.*check the network"),
        ("RepositoryNotFoundError", "refused by the hub.*check the spelling"),
        ("GatedRepoError", "refused by the hub.*log in"),
    ],
)
def test_hub_failures_are_one_message(
    error: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    errors = pytest.importorskip("huggingface_hub.errors")
    kind = getattr(errors, error)

    def download(*_: object, **__: object) -> str:
        raise kind.__new__(kind, "no such thing")

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(UserError, match=f"no folder some/name here.*{words}"):
        resolve("some/name")


# Writing: all or nothing.


def listing(folder: Path) -> list[str]:
    """Everything under a folder, hidden files too."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def test_nothing_is_left_when_a_source_fails(tmp_path: Path) -> None:
    def fail() -> np.ndarray:
        raise UserError("the third tensor cannot be read")

    def ones() -> np.ndarray:
        return np.ones(4, np.float32)

    sources = {name: TensorSource("F32", (4,), ones) for name in "ab"}
    sources["c"] = TensorSource("F32", (4,), fail)
    with pytest.raises(UserError, match="third tensor"):
        write_folder(tmp_path / "m", sources, CONFIG)
    assert listing(tmp_path) == []


def test_a_failed_overwrite_keeps_the_old_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    before = {name: (folder / name).read_bytes() for name in listing(folder)}
    wrong = {"a": TensorSource("F32", (4,), lambda: np.ones(3, np.float32))}
    with pytest.raises(AssertionError, match="not what it announced"):
        write_folder(folder, wrong, CONFIG, overwrite=True)
    assert {name: (folder / name).read_bytes() for name in listing(folder)} == before
    assert listing(tmp_path)[0] == "m", "a partial folder was left"


def test_overwriting_needs_consent_and_ownership(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    with pytest.raises(UserError, match="already holds a checkpoint"):
        write(folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"also holds notes\.txt"):
        write(folder, overwrite=True)
    (folder / "notes.txt").unlink()
    write(folder, overwrite=True, max_shard=40)
    assert len(Checkpoint.open(folder).names()) == 5
    assert not (folder / "model.safetensors").exists(), "an old file survived"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m"]


def test_a_foreign_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="no checkpoint of ours"):
            write(tmp_path, overwrite=overwrite)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        write(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert Checkpoint.open(write(tmp_path / "empty")).names()


@pytest.mark.parametrize("place", ["/proc/endside/m", "/dev/null/m"])
def test_an_unwritable_place_is_one_message(place: str) -> None:
    with pytest.raises(UserError, match=r"cannot be written.*writable"):
        write(Path(place))


def test_leftovers_of_a_killed_writer_are_swept(tmp_path: Path) -> None:
    """kill -9 leaves a hidden partial folder and no checkpoint; the next writer cleans up."""
    script = """
import os, signal, sys
from pathlib import Path
import numpy as np
from endside.checkpoint import write_folder
from endside.shards import TensorSource
def die():
    os.kill(os.getpid(), signal.SIGKILL)
sources = {"a": TensorSource("F32", (4,), lambda: np.ones(4, np.float32)),
           "b": TensorSource("F32", (4,), die)}
write_folder(sys.argv[1], sources, {})
"""
    target = tmp_path / "m"
    done = subprocess.run([sys.executable, "-c", script, str(target)], check=False)
    assert done.returncode == -9 and not target.exists()
    assert len(list(tmp_path.glob(".m.partial-*"))) == 1
    write(target)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m"]


def test_importing_is_light() -> None:
    """Neither torch nor the hub's library is loaded by importing the module."""
    code = "import sys, endside.checkpoint; print({'torch', 'huggingface_hub'} & {*sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "set()"


def test_every_dtype_has_a_numpy_type() -> None:
    assert {np.dtype(kind).itemsize for kind in NUMPY.values()} == {1, 2, 4, 8}
