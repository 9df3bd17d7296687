"""tve-hf explain on data sets: shards, what it says, and what it refuses, alone and launched."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import datasets
import psutil
import pyarrow.parquet as pq
import pytest
from interruptions import at_call, die, fill_disk, in_a_fork
from tiny import noise_image, save_noise

from tve_hf.bulk import run, shards
from tve_hf.cli import main

ROOT = Path(__file__).parents[2]
NUMBER = 10
pytestmark = pytest.mark.usefixtures("isolated")


@pytest.fixture
def noise(tmp_path):
    return save_noise(tmp_path / "noise.parquet", NUMBER)


@pytest.fixture
def arguments(pair, tmp_path, noise):
    """Of a run with the tiny models in small shards."""
    models = ["--classifier", pair[0], "--model", pair[1], "--batch-size", 2, "--shard-size", 4]
    return [*map(str, ["explain", "--data-files", noise, "--output", tmp_path / "out", *models])]


def ids(folder):
    return [row for file in sorted((folder / "data").glob("maps-*")) for row in pq.read_table(file)["id"].to_pylist()]


@pytest.mark.parametrize("how", ["--data-files", "--data_files", "--dataset-name", "--streaming"])
def test_a_data_set_becomes_shards_that_datasets_loads_back(arguments, tmp_path, capsys, noise, how):
    if how == "--dataset-name":
        datasets.Dataset.from_parquet(str(noise)).save_to_disk(str(tmp_path / "saved"))
        arguments[1:3] = ["--dataset-name", str(tmp_path / "saved")]
    elif how == "--streaming":
        arguments.append(how)
    else:
        arguments[1] = how
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert f"{NUMBER} images in " in out and f"datasets.load_dataset({str(tmp_path / 'out')!r}) reads them" in out
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert rows["id"] == [str(number) for number in range(NUMBER)]
    assert len([*(tmp_path / "out" / "data").iterdir()]) == 3


def test_a_folder_with_a_bad_image(arguments, tmp_path, capsys):
    (tmp_path / "photos" / "below").mkdir(parents=True)
    for place in ("a.png", "below/b.png"):
        noise_image(1).save(tmp_path / "photos" / place)
    (tmp_path / "photos" / "c.png").write_bytes(b"no image")
    arguments[2] = str(tmp_path / "photos")
    assert main(arguments) == 0
    assert "3 images in " in (out := capsys.readouterr().out) and "1 of which have an error in the place of" in out
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert [Path(name).name for name in rows["image"]] == ["a.png", "b.png", "c.png"]
    assert [bool(error) for error in rows["error"]] == [False, False, True] and "c.png" in rows["error"][2]


def test_the_same_command_goes_on(arguments, tmp_path, capsys, monkeypatch):
    def killed():
        monkeypatch.setattr(shards.pq, "write_table", at_call(2, die, shards.pq.write_table))
        main(arguments)

    assert in_a_fork(killed) == -9
    assert ids(tmp_path / "out") == ["0", "1", "2", "3"]
    capsys.readouterr()
    assert main(arguments) == 0
    assert "4 images were done before" in (out := capsys.readouterr().out) and "6 images in " in out
    assert ids(tmp_path / "out") == [str(number) for number in range(NUMBER)]
    assert main([*arguments, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("interrupt", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_says_what_is_done(arguments, tmp_path, capsys, monkeypatch, request, interrupt, code):
    if interrupt == signal.SIGINT:  # which a shell lets its background jobs ignore
        previous = signal.signal(signal.SIGINT, signal.default_int_handler)
        request.addfinalizer(lambda: signal.signal(signal.SIGINT, previous))
    results_of = run.results_of
    monkeypatch.setattr(run, "results_of", at_call(4, lambda *_: os.kill(os.getpid(), interrupt), results_of))
    assert main(arguments) == code
    err = capsys.readouterr().err.splitlines()
    assert err[-2] == "tve-hf: interrupted." and err[-1].endswith("are whole; the same command goes on.")
    assert ids(tmp_path / "out") == ["0", "1", "2", "3"] and not [*(tmp_path / "out").rglob("*partial*")]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["photo.jpg"], "leave out images named one by one"),
        (["--json"], "leave out --json"),
        (["--full-size"], "leave out --full-size"),
        (["--dataset-name", "org/data"], "either as --data-files or as --dataset-name"),
        (["--shard-size", "0"], "--shard-size is 0"),
        (["--data-files", "{tmp}/none.parquet"], "none.parquet"),
        (["--image-column", "picture"], "No column 'picture'"),
        (["--output", "{tmp}/noise.parquet"], "is a file; name a folder"),
        (["--output", "{tmp}"], "is not empty, and no run of `tve-hf explain` over a data set began it"),
        (["--label", "taby"], "did you mean"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, tmp_path, capsys, more, said):
    assert main([*arguments, *(argument.format(tmp=tmp_path) for argument in more)]) == 1
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("tve-hf: ")]
    assert len(lines) == 1 and said in lines[0] and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_other_settings_damage_and_a_full_disk_end_in_one_sentence_and_leave_the_shards(
    arguments, tmp_path, capsys, monkeypatch
):
    assert main(arguments) == 0
    shards_before = {file: file.read_bytes() for file in (tmp_path / "out" / "data").iterdir()}
    capsys.readouterr()
    for more, said in ((["--rule", "logit"], "(rule was "), (["--shard-size", "5"], "(shard_size was 4 and is 5")):
        assert main([*arguments, *more]) == 1
        assert f"was begun with other settings {said}" in capsys.readouterr().err
    first, second, _ = sorted(shards_before)
    first.write_bytes(b"PAR1")
    assert main(arguments) == 1
    assert f"{first} is damaged or of another run" in capsys.readouterr().err
    first.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(shards.pq, "write_table", fill_disk)
        assert main(arguments) == 1
    err = capsys.readouterr().err.splitlines()
    assert "takes no results (No space left on device)" in err[-2]
    assert err[-1] == f"the shards in {tmp_path / 'out'} are whole; the same command goes on."
    assert second.read_bytes() == shards_before[second]
    assert main(arguments) == 0 and ids(tmp_path / "out") == [str(number) for number in range(NUMBER)]


@pytest.mark.parametrize("more", [["--shard-size", "9"], ["--streaming"]])
def test_processes_share_the_work(arguments, tmp_path, monkeypatch, capsys, more):
    """As `accelerate launch` starts them, one after the other; then one alone goes on with the same shards."""
    arguments += more
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in ("1", "0", "2"):
        monkeypatch.setenv("RANK", rank)
        before = len(ids(tmp_path / "out"))
        assert main(arguments) == 0
        assert f"Process {rank} of 3: " in capsys.readouterr().out and before < len(ids(tmp_path / "out")) < 11
    assert sorted(map(int, ids(tmp_path / "out"))) == [*range(NUMBER)]
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert main(arguments) == 0
    assert "10 images were done before" in capsys.readouterr().out


def kill(launcher: int) -> None:
    """End a launcher and the processes that it started, which have sessions of their own."""
    process = psutil.Process(launcher)  # psutil comes with accelerate
    for one in (process, *process.children(recursive=True)):
        one.kill()


@pytest.mark.slow
def test_launched_by_accelerate_and_killed(arguments, tmp_path):
    """Two real processes, both of which SIGKILL ends in the middle."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    launch += ["--config_file", str(ROOT / "examples" / "accelerate" / "ddp.yaml"), "-m", "tve_hf"]
    own = {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache"), "ACCELERATE_USE_CPU": "true"}
    command = [*launch, *arguments, "--shard-size", "1", "--batch-size", "1"]
    with subprocess.Popen(command, env=os.environ | own, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not ids(tmp_path / "out"):
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
        kill(process.pid)
    assert ids(tmp_path / "out")
    result = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "Process 0 of 2: " in result.stdout and "Process 1 of 2: " in result.stdout
    assert [*map(int, ids(tmp_path / "out"))] == [*range(NUMBER)]
