"""The calibration section: its figures come along, it replaces its predecessor, and nothing else of the card moves."""

import pytest

from trl_capo import cli
from trl_capo.publish.card import add_to_model_card, restore_in_model_card


def write_block(folder, number):
    (folder / "page-maths.png").write_bytes(b"figure %d" % number)
    (folder / "page.md").write_text(f"### maths\n\nAUC within {number}\n\n![figures](page-maths.png)\n")
    return folder / "page.md"


def test_section_with_its_figures(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "README.md").write_text("---\ntags: [x]\n---\n\n# Mine\n\nText.\n")
    add_to_model_card(write_block(tmp_path, 1), model)
    card = (model / "README.md").read_text()
    assert card.startswith("---\ntags: [x]\n---\n\n# Mine\n\nText.\n\n<!--") and "AUC within 1" in card
    assert (model / "page-maths.png").read_bytes() == b"figure 1"

    (model / "README.md").write_text(card + "\nMore.\n")
    add_to_model_card(write_block(tmp_path, 2), model)
    card = (model / "README.md").read_text()
    assert "AUC within 1" not in card and card.count("AUC within 2") == 1
    assert "Text." in card and card.endswith("More.\n") and (model / "page-maths.png").read_bytes() == b"figure 2"

    restore_in_model_card(model)
    assert (model / "README.md").read_text() == card


def test_without_a_card_or_without_a_section(tmp_path):
    restore_in_model_card(tmp_path)
    assert not (tmp_path / "README.md").exists()
    model = tmp_path / "model"
    model.mkdir()
    assert "AUC within 3" in add_to_model_card(write_block(tmp_path, 3), model).read_text()


def test_no_folder(tmp_path, capsys):
    with pytest.raises(ValueError, match="is not a folder"):
        add_to_model_card(write_block(tmp_path, 1), tmp_path / "nowhere")
    for samples, message in ((tmp_path / "x", "x does not exist"), (tmp_path, "--model_card must be the folder of a")):
        assert cli.main(["report", str(samples), "--model_card", str(tmp_path / "nowhere")]) == 2
        assert message in capsys.readouterr().err
