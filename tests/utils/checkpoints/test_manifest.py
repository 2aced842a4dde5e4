"""A checkpoint's folder: whole or not there, every byte checked, read by any layout of ranks."""

import json

import pytest
import torch
from safetensors.torch import load_file

from utils.checkpoints import manifest


def write(output, step: int, **tensors) -> None:
    """A checkpoint of one file."""
    folder = manifest.folder_of(output, step)
    temporary = folder.with_name(f".{folder.name}.writing")
    (temporary / "weights").mkdir(parents=True)
    (temporary / "weights/config.json").write_text("{}")
    files = {"a.safetensors": manifest.write_tensors(temporary / "a.safetensors", tensors)}
    files |= manifest.listed(temporary, files)
    record = {"format": manifest.FORMAT, "step": step, "nan": float("nan"), "files": files}
    manifest.seal(temporary, folder, record)


def test_tensors_are_written_as_safetensors_reads_them(tmp_path):
    tensors = {
        "scalar": torch.tensor(3.5),
        "none": torch.zeros(0),
        "half": torch.randn(7, 3).half(),
        "bf16": torch.randn(5).bfloat16(),
        "long": torch.arange(9),
        "bytes": torch.arange(255, dtype=torch.uint8),
        "view": torch.randn(4, 6).t()[1:3],
        "double": torch.randn(3, dtype=torch.float64),
    }
    said = manifest.write_tensors(tmp_path / "t.safetensors", tensors)
    found = load_file(tmp_path / "t.safetensors")
    assert found.keys() == tensors.keys()
    for name, t in tensors.items():
        assert found[name].dtype == t.dtype and torch.equal(found[name], t), name
    import hashlib

    written = (tmp_path / "t.safetensors").read_bytes()
    assert said == {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}


def test_a_checkpoint_is_listed_once_it_is_whole(tmp_path):
    write(tmp_path, 3, x=torch.ones(2))
    write(tmp_path, 12, x=torch.ones(2))
    half = manifest.folder_of(tmp_path, 20)
    half.with_name(f".{half.name}.writing").mkdir()
    assert manifest.steps_in(tmp_path) == [12, 3]
    record = manifest.read(manifest.folder_of(tmp_path, 12))
    assert record["step"] == 12 and record["files"].keys() == {
        "a.safetensors",
        "weights/config.json",
    }
    manifest.verify(manifest.folder_of(tmp_path, 12), record)
    manifest.remove_unfinished(tmp_path)
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step-000003", "step-000012"}


@pytest.mark.parametrize("name", ["a.safetensors", "weights/config.json", "manifest.json"])
@pytest.mark.parametrize("how", ["lost", "shorter", "longer", "flipped"])
def test_every_damage_is_found_and_named(tmp_path, name, how):
    write(tmp_path, 3, x=torch.randn(100))
    folder = manifest.folder_of(tmp_path, 3)
    data = bytearray((folder / name).read_bytes())
    if how == "lost":
        (folder / name).unlink()
    else:
        data[len(data) // 2] ^= how == "flipped"
        data = {"shorter": data[:-1], "longer": data + b"\0", "flipped": data}[how]
        (folder / name).write_bytes(data)
    with pytest.raises(manifest.Damaged, match=str(folder / name)):
        manifest.verify(folder, manifest.read(folder))


def test_every_flipped_bit_of_a_manifest_is_found(tmp_path):
    write(tmp_path, 3, x=torch.randn(3))
    path = manifest.folder_of(tmp_path, 3) / "manifest.json"
    whole = path.read_bytes()
    record = manifest.read(path.parent)
    for place in range(len(whole)):
        for bit in (0, 3, 5):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            path.write_bytes(data)
            try:
                found = manifest.read(path.parent)
            except manifest.Damaged:
                continue
            # White space between two values is all that may change.
            assert json.dumps(found) == json.dumps(record), (place, bit)


def test_any_layout_reads_what_any_layout_wrote(tmp_path):
    whole = torch.randn(103)
    for cuts in ([0, 103], [0, 52, 103], [0, 1, 40, 41, 103]):
        names = []
        for rank, (start, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
            names.append(f"rank{rank}-of-{len(cuts)}.safetensors")
            tensors = {f"model|w|weight|{start}": whole[start:end]}
            manifest.write_tensors(tmp_path / names[-1], tensors)
        reader = manifest.Reader(tmp_path, names[::-1])
        for start in range(0, 103, 17):
            for length in (1, 5, 103 - start):
                wanted = whole[start : start + length][: 103 - start]
                found = reader.read("model", "w", "weight", start, len(wanted))
                assert torch.equal(found, wanted), (cuts, start, length)
        with pytest.raises(manifest.Damaged, match="'w' up to element 103, and 104 are wanted"):
            reader.read("model", "w", "weight", 0, 104)
        with pytest.raises(manifest.Damaged, match="of another model"):
            reader.read("model", "other", "weight", 0, 4)


def test_a_gap_between_runs_is_no_data(tmp_path):
    manifest.write_tensors(
        tmp_path / "r.safetensors",
        {"m|w|weight|0": torch.ones(4), "m|w|weight|6": torch.ones(4)},
    )
    reader = manifest.Reader(tmp_path, ["r.safetensors"])
    assert reader.read("m", "w", "weight", 7, 2).tolist() == [1, 1]
    with pytest.raises(manifest.Damaged, match="up to element 4"):
        reader.read("m", "w", "weight", 2, 6)
