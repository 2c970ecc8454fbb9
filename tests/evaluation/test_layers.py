"""Which treatment a layer gets, from videos of one treated layer."""

from evaluation.analysis.layers import choose_layers, layer_settings, layer_summary


def test_each_label_treats_one_layer() -> None:
    settings = layer_settings(2)
    assert list(settings) == ["positions-00", "sparse-00", "positions-01", "sparse-01"]
    assert settings["positions-01"] == {"position_layers": (1,), "sparse_layers": ()}
    assert settings["sparse-00"] == {"position_layers": (), "sparse_layers": (0,)}


def test_a_layer_gets_the_treatment_to_which_it_is_more_sensitive() -> None:
    """Changes count over the mean of their treatment: sparsity changes every layer more, and layer 1 more than others."""
    changes = {"positions": (1.0, 1.0, 4.0), "sparse": (10.0, 40.0, 10.0)}
    rows = [
        {"treatment": name, "layer": layer, "prompt": prompt, "change": change + prompt, "gain": 0.1 * layer}
        for name, found in changes.items()
        for layer, change in enumerate(found)
        for prompt in (0, 1)
    ]
    summary = layer_summary(rows)
    assert [row["change"] for row in summary] == [1.5, 1.5, 4.5, 10.5, 40.5, 10.5]
    assert choose_layers(summary) == {"position_layers": [0, 2], "sparse_layers": [1]}
    for row in rows:  # the control: the changes of layers 1 and 2 exchanged
        row["layer"] = (0, 2, 1)[row["layer"]]
    assert choose_layers(layer_summary(rows)) == {"position_layers": [0, 1], "sparse_layers": [2]}
