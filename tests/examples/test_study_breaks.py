"""The study of where maps break: images spoilt as it says, the pipeline's own maps, and a summary by loops."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr
from scripts import words
from tiny import GRID, noise_image, save_classifier, save_models

from tve_hf import TVEExplainer, fidelity, methods, split_classifier, transfer
from tve_hf.faithfulness import faithfulness
from tve_hf.verification import spearman, verify


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("breaks"), 5)


def arguments(models, output, *more, backgrounds="random"):
    given = {"--classifier": models / "classifier", "--model": models / backgrounds, "--output_dir": output}
    given |= {"--files": models / "noise.parquet", "--verify": 16, "--ceiling_samples": 8}
    return words(given, "--conditions", "clean", "noise_0.4", *more)


# --- what is done to images ------------------------------------------------------------------------------------------

PICTURE = noise_image(3, (90, 60))


@pytest.mark.parametrize("share", [0.01, 0.02, 0.04])
def test_blur_is_a_gaussian_of_that_share_of_the_shorter_side(study, share):
    found = np.asarray(study.CONDITIONS[f"blur_{share}"](PICTURE, 0), float)
    expected = gaussian_filter(np.asarray(PICTURE, float), (share * 60, share * 60, 0), mode="nearest")
    assert np.abs(found - expected).max() < 8 and np.abs(found - expected).mean() < 1.5  # PIL's is one of boxes
    assert np.abs(found - np.asarray(PICTURE)).mean() > 3 * np.abs(found - expected).mean()


@pytest.mark.parametrize("deviation", [0.1, 0.2, 0.4])
def test_noise_has_that_deviation_and_is_that_of_the_row(study, deviation):
    spoil = study.CONDITIONS[f"noise_{deviation}"]
    grey = np.asarray(spoil(Image.new("RGB", (200, 100), (128, 128, 128)), 7), float)
    noise = np.random.default_rng(0).normal(128, 255 * deviation, 10**6).clip(0, 255)
    assert grey.shape == (100, 200, 3)
    assert grey.mean() == pytest.approx(128, abs=2) and grey.std() == pytest.approx(noise.std(), rel=0.03)
    one, again, other = (np.asarray(spoil(PICTURE, row)) for row in (1, 1, 2))
    assert (one == again).all() and (one != other).mean() > 0.5  # some are clipped alike


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_fewer_pixels_are_those_of_bicubic_with_antialiasing(study, factor):
    faint = Image.fromarray(64 + np.asarray(PICTURE) // 2)  # PIL clips in between
    x = torch.from_numpy(np.array(faint)).permute(2, 0, 1)[None].float()
    for size in ((round(60 / factor), round(90 / factor)), (60, 90)):
        x = F.interpolate(x, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    found = np.asarray(study.CONDITIONS[f"shrunk_{factor}"](faint, 0), float)
    assert np.abs(found - x[0].permute(1, 2, 0).numpy()).max() <= 2
    assert study.CONDITIONS["shrunk_8"](PICTURE.resize((3, 2)), 0).size == (3, 2)


def test_clean_is_the_image_itself(study):
    assert study.CONDITIONS["clean"](PICTURE, 0) is PICTURE


# --- what is said of it ----------------------------------------------------------------------------------------------


def made_up(images=40):
    generator = torch.Generator().manual_seed(0)
    names = ["r2", "pearson", "score", "sampled_spearman"]
    names += [f"gap/{removal}/{spec}" for removal in ("zero", "blur") for spec in ("tve", "random", "sampled")]
    return {name: torch.rand(2, images, generator=generator).double() for name in names}


def test_the_summary_is_that_of_loops(study):
    tables = made_up()
    tables["r2"][0, 5] = tables["r2"][1, 6]  # a tie
    summary = study.summarize(tables, ["clean", "noise_0.4"], "r2", 0.3)
    pairs = [(c, i) for c in range(2) for i in range(40)]
    kept = [(c, i) for c, i in pairs if tables["r2"][c, i] >= 0.3]
    rest = [pair for pair in pairs if pair not in kept]
    assert summary["trusted"]["all"][0] == pytest.approx(len(kept) / 80)
    for removal in ("zero", "blur"):
        gaps = {spec: tables[f"gap/{removal}/{spec}"] for spec in ("tve", "random", "sampled")}
        gaps["shortfall"] = gaps["sampled"] - gaps["tve"]
        for spec, values in gaps.items():
            ours, others = (sum(values[pair].item() for pair in some) / len(some) for some in (kept, rest))
            found = summary["trust"][removal][spec]
            assert [found[name][0] for name in ("trusted", "not trusted", "difference")] == pytest.approx(
                [ours, others, ours - others]
            )
            assert summary["gap"][removal][spec]["noise_0.4"][0] == pytest.approx(np.mean(values[1].tolist()))
        for name, rows in (("clean", [0]), ("noise_0.4", [1]), ("all", [0, 1])):
            for spec in ("tve", "shortfall"):
                of_both = [table[rows].flatten().numpy() for table in (tables["r2"], gaps[spec])]
                found = summary["relation"][removal][spec][name]["r2"][0]
                assert found == pytest.approx(spearmanr(*of_both).statistic, abs=1e-5)
    assert summary["verify"]["r2"]["clean"][0] == pytest.approx(np.median(tables["r2"][0].numpy()))


def test_an_interval_is_that_of_drawn_images_with_all_that_was_done_to_them(study):
    gap, score = (made_up()[name] for name in ("gap/zero/tve", "score"))
    trusted = (score > 0.5).double()
    value, low, high = study.estimate(study.difference, gap, trusted)
    drawn = []
    random = np.random.default_rng(1)
    for _ in range(2000):
        images = random.integers(0, 40, 40)
        pairs = [(gap[c, i].item(), trusted[c, i].item()) for c in range(2) for i in images]
        drawn.append(np.mean([g for g, t in pairs if t]) - np.mean([g for g, t in pairs if not t]))
    assert low < value < high
    assert [low, high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.02)
    # The same thing done twice says nothing more.
    assert study.estimate(study.mean, gap[:1]) == pytest.approx(study.estimate(study.mean, gap[[0, 0]]))


def test_what_no_image_tells_has_no_number(study):
    gap = made_up()["gap/zero/tve"]
    assert np.isnan(study.estimate(study.difference, gap, torch.ones_like(gap))).all()


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backgrounds", ["random", "antithetical"])
def test_rows_are_the_pipelines_maps_and_what_verify_says_of_them(study, models, tmp_path, backgrounds):
    study.main(arguments(models, tmp_path, "--plot", backgrounds=backgrounds))
    report = json.loads((tmp_path / "report.json").read_text())
    classifier = split_classifier(models / "classifier")
    explainer = TVEExplainer.from_pretrained(models / backgrounds).eval()
    rows = torch.randperm(5, generator=torch.Generator().manual_seed(0)).tolist()
    assert report["rows"] == rows and report["num_images"] == 5
    for condition in ("clean", "noise_0.4"):
        spoilt = [study.CONDITIONS[condition](noise_image(row), row) for row in rows]
        x = classifier.image_processor(spoilt, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            seen = classifier.reading(tuple(explainer.config.feature_names))(x)
            y = seen.logits.argmax(-1)
            kept, removed = explainer(x, seen.features, seen.embeddings).to_tuple()
        found = report["per_image"][condition]
        assert found["class_idx"] == y.tolist()
        maps = {"tve": methods.explain("tve", classifier, x, y, explainer=explainer)}
        how = {"n_samples": 8}
        if backgrounds == "random":
            how |= {"coalitions": explainer.config.distribution, "rule": "prob"}
            logits = transfer(kept, removed, classifier, y[:, None], "logit", GRID)
            checks = faithfulness(classifier, x, logits, y[:, None], 16, explainer.config.distribution)
            said = {name: [getattr(check, name) for (check,) in checks] for name in ("r2", "pearson")}
        else:
            checks = verify(classifier, x, kept, removed, y, 16, hops=1)
            said = {name: [getattr(check, name) for check in checks] for name in ("spearman", "pearson")}
        for name, values in said.items():
            assert found[name] == pytest.approx(values, rel=1e-4, abs=2e-4)
        maps["sampled"] = methods.explain("sampled", classifier, x, y, GRID, hops=1, **how)
        for spec, scores in maps.items():
            for removal in ("zero", "blur"):
                gaps = fidelity(classifier, x, scores, y, removal=removal).gap
                assert found[f"gap/{removal}/{spec}"] == pytest.approx(gaps.tolist(), abs=2e-4)
        agreement = spearman(maps["tve"].flatten(1), maps["sampled"].flatten(1))
        assert found["sampled_spearman"] == pytest.approx(agreement.tolist(), abs=2e-4)
    least = {"random": {"measure": "r2", "least": 0.2}, "antithetical": {"measure": "spearman", "least": 0.4}}
    assert report["summary"]["check"] == least[backgrounds]
    assert (tmp_path / "gaps.png").read_bytes().startswith(b"\x89PNG")


def test_a_stopped_run_goes_on_to_the_same_numbers(study, models, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "BATCH", 2)
    study.main(arguments(models, tmp_path / "whole"))
    judged, calls = study.judged, []

    def stopping(*given):
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return judged(*given)

    monkeypatch.setattr(study, "judged", stopping)
    with pytest.raises(KeyboardInterrupt):
        study.main(arguments(models, tmp_path / "stopped"))
    assert not (tmp_path / "stopped" / "report.json").exists()
    study.main(arguments(models, tmp_path / "stopped"))
    assert len(calls) == 4 + 3  # of 6 batches the three that were done are not done again
    one, other = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "stopped"))
    assert one["per_image"] == other["per_image"] and one["summary"] == other["summary"]
    with pytest.raises(SystemExit, match="holds results of other settings .*verify was 16, now 32"):
        study.main(arguments(models, tmp_path / "stopped", "--verify", "32"))


def test_without_a_ceiling_nothing_is_sampled(study, models, tmp_path):
    study.main(arguments(models, tmp_path, "--ceiling_samples", "0", "--num_images", "2"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["num_images"] == 2 and "sampled" not in json.dumps(report["summary"])


def test_bad_input_is_refused_before_anything_is_computed(study, models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "judged", None)
    other = save_classifier(tmp_path / "other", hidden_size=32)
    for more, said in (
        (
            ["--classifier", str(other)],
            "The explainer .*random predicts embeddings of 24 dimensions, .*; use",
        ),
        (["--ceiling_samples", "7"], "ceiling_samples is 7, but coalitions come in pairs"),
        (["--verify", "4"], "verify is 4; a correlation needs 8 coalitions"),
        (["--num_images", "0"], "gives no image with num_images=0; pass at least one"),
        (["--files", str(tmp_path / "none.parquet")], "none.parquet"),
    ):
        with pytest.raises(SystemExit, match=said):
            study.main(arguments(models, tmp_path / "out", *more))
    with pytest.raises(SystemExit):
        study.main(arguments(models, tmp_path / "out", "--conditions", "fog"))
    assert "invalid choice: 'fog' (choose from" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
