"""Sizes and work at the paper's size, against the figures of the specification's section 9."""

import pytest

from configs import ucf101
from stf_jax.cost import inspection, layer_costs, memory_plan, total
from stf_jax.run import Settings


def costs(*changes, flow_frames=4):
    config = ucf101.get_config()
    config.sampling.flow_frames = flow_frames
    config.model.update(*changes)
    return layer_costs(Settings.of(config), 101)


def part(layers, *prefixes):
    whole = total("", [layer for layer in layers if layer.name.startswith(prefixes)])
    return whole.parameters, round(whole.macs / 1e9, 2)


def test_the_paper_s_size_with_eight_flow_channels():
    assert part(costs(), "") == (216_005_251, 1087.04)


def test_the_blocks_of_the_specification_s_table():
    layers = costs(flow_frames=2)  # 4 channels
    assert part(layers, "") == (216_002_947, 1084.27)
    assert part(layers, "spatial/") == (14_714_688, 368.32)
    assert part(layers, "temporal/block") == (5_276_032, 291.33)
    assert part(layers, "temporal/mst", "temporal/conv3d") == (39_854_080, 357.61)
    assert part(layers, "fusion/") == (14_156_288, 66.59)
    assert part(layers, "recurrent/", "head") == (142_001_859, 0.43)
    shapes = {layer.name: layer.output for layer in layers}
    assert shapes["temporal/mst1/branch3/temporal"] == (1, 24, 28, 28, 512)
    assert shapes["fusion/conv"] == (1, 24, 14, 14, 512)


def test_variants_cost_what_the_specification_says():
    full = {"conv3d": {"factorised": False}, "temporal": {"pool4": "after_mst1"}}
    assert part(costs(full, flow_frames=2), "")[1] == pytest.approx(1882.1, abs=0.06)
    early = {"temporal": {"pool4": "before_mst1"}}
    assert part(costs(early, flow_frames=2), "")[1] == pytest.approx(914.1, abs=0.06)


def test_a_loss_that_only_training_has_takes_memory_there_and_no_work_of_an_answer(tiny_config):
    before = Settings.of(tiny_config.copy_and_resolve_references())
    tiny_config.model.fusion.loss_without = ("rgb",)
    after = Settings.of(tiny_config)
    assert layer_costs(after, 2) == layer_costs(before, 2)
    assert memory_plan(after, 2).activations > memory_plan(before, 2).activations


@pytest.mark.parametrize("streams", ["both", "late"])
def test_forgetting_more_keeps_less(tiny_config, streams):
    tiny_config.model.streams = streams

    def kept(how):
        tiny_config.model.remat.update(spatial=how, temporal=how)
        return memory_plan(Settings.of(tiny_config), 2)

    plans = [kept(how) for how in ("none", "convolutions", "blocks", "all")]
    sizes = [plan.activations for plan in plans]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    assert len({plan.parameters for plan in plans}) == 1
    # Adam keeps two numbers a weight.
    assert 2 * plans[0].parameters <= plans[0].optimizer < 2 * plans[0].parameters + 100


def test_an_inspection_names_every_layer_weight_and_stage(tiny_config):
    text = inspection(tiny_config)
    settings = Settings.of(tiny_config)
    for layer in layer_costs(settings, 2):
        assert layer.name in text
    assert "initialised at random" in text and "kept for the backward pass (4 clips)" in text
    assert "Weights of stage 'second': all from the best of the stage before" in text


def test_an_inspection_says_which_weights_are_imagenet_s():
    text = inspection(ucf101.get_config("laptop"))
    assert "copied from" not in text
    config = ucf101.get_config()
    config.model.temporal.conv1_init = "rgb_mean"
    text = inspection(config)
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "copied from block5_conv3/kernel" in lines["spatial/block5_conv3/kernel"]
    assert "averaged over colours" in lines["temporal/block1_conv1/kernel"]
    assert "initialised at random" in lines["temporal/mst1/branch1/spatial/kernel"]
