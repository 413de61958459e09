"""python -m benchmarks networks: what is counted, how a step is made, what its table says."""

import dataclasses

import pytest
import torch
from torch import nn

from benchmarks import network_step, networks, result
from benchmarks.__main__ import main
from benchmarks.network_step import MATMUL, NETWORKS, REFERENCE, Setting, Stepper
from benchmarks.result import Row
from fastssl.backbones import vgg

SMALL = Setting(device=torch.device("cpu"), side=32, batch=2, bf16=False)


# ---- What is counted ----------------------------------------------------------------------------


def test_torchvision_s_resnet50_has_4_09_gmac_and_ours_of_k_4_the_same():
    theirs = network_step.counts(REFERENCE, 4, 224)

    assert theirs.parameters == 25_557_032 - 2049 * 1000  # without the classifier
    assert theirs.forward_macs == pytest.approx(4.09e9, rel=0.001)
    assert network_step.counts("v1", 4, 224) == theirs


def test_a_training_step_is_three_forward_passes_less_the_gradient_of_the_images():
    found = network_step.counts(REFERENCE, 4, 64)
    first = 3 * 64 * 7 * 7 * 32 * 32  # multiply-adds of the first convolution

    assert found.training_flops == 2 * (3 * found.forward_macs - first)


def test_what_is_computed_again_is_no_more_work_done():
    assert network_step.counts("revnet", 1, 64) == network_step.counts("revnet-plain", 1, 64)


# ---- A step -------------------------------------------------------------------------------------


def test_a_step_leaves_no_gradient_and_moves_the_running_statistics():
    stepper = Stepper("v1", 1, "contiguous", SMALL)
    norms = [each for each in stepper.network.modules() if isinstance(each, nn.BatchNorm2d)]
    stepper.step()

    assert norms
    assert all(int(norm.num_batches_tracked) == 1 for norm in norms)  # pyright: ignore[reportArgumentType]
    assert all(each.grad is None for each in stepper.network.parameters())


@pytest.mark.parametrize("variant", ["contiguous", "channels-last"])
def test_a_variant_s_memory_reaches_the_last_convolution(variant):
    stepper = Stepper("v2", 1, variant, dataclasses.replace(SMALL, side=64))  # ends in 2 x 2
    seen = []
    *_, last = (each for each in stepper.network.modules() if isinstance(each, nn.Conv2d))
    last.register_forward_pre_hook(lambda module, given: seen.append(given[0].stride(1) == 1))
    stepper.step()

    assert seen == [variant == "channels-last"]


def test_the_compiled_variant_is_compiled():
    compiled = []

    def backend(graph, inputs):
        compiled.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph.forward

    Stepper("vgg19", 1, "compiled", SMALL, backend=backend).step()  # pyright: ignore[reportArgumentType]

    assert len(compiled) == 1
    assert compiled[0] > 18  # convolutions


def test_recomputing_keeps_less_for_the_backward_pass():
    plain = Stepper("revnet-plain", 1, "channels-last", SMALL).activations()
    stepper = Stepper("revnet", 1, "channels-last", SMALL)

    assert stepper.activations().kept < 2 / 3 * plain.kept
    assert all(each.grad is None for each in stepper.network.parameters())


def test_most_of_a_step_s_time_is_put_to_its_kinds_of_work():
    found = network_step.parts(Stepper("v1", 1, "contiguous", SMALL))

    assert list(found) == [*network_step.KINDS, "other"]
    assert all(each > 0 for each in found.values())
    assert found["other"] < sum(found.values()) / 2


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::convolution_backward", "convolution"),
        ("aten::addmm", "convolution"),
        ("aten::cudnn_batch_norm_backward", "norm"),
        ("aten::clamp_min_", "ReLU"),
        ("aten::threshold_backward", "ReLU"),
        ("aten::max_pool2d_with_indices_backward", "pooling"),
        ("aten::cat", "copies"),
        ("aten::add_", "sums"),
        ("aten::empty", "other"),
    ],
)
def test_an_operator_s_kind_is_told_by_its_name(operator, kind):
    assert network_step.kind_of(operator) == kind


# ---- The table ----------------------------------------------------------------------------------


def row(network, variant, rates, gmac=1.0, **parts):
    extra = {"network": network, "variant": variant, "widening": 4, "parameters": 2_000_000}
    extra |= {"forward_gmac": gmac, "training_gflop": 6 * gmac, "activations_peak_mb": 12.5}
    kinds = dict.fromkeys((*network_step.KINDS, "other"), 1.0) | parts
    extra |= {f"{kind}_ms": each for kind, each in kinds.items()}
    label = f"{network}, {variant}"
    return Row(name=label, group="k = 4", unit="images/s", values=rates, extra=extra)


ROWS = [
    Row(name=MATMUL, group="k = 4", unit="TFLOP/s", values=[1.2, 2.4]),
    row(REFERENCE, "contiguous", [100.0, 200.0]),
    row(REFERENCE, "channels-last", [120.0, 240.0]),
    row("vgg19", "channels-last", [90.0, 150.0], gmac=2.0),
    row("revnet", "channels-last", [180.0, 360.0], gmac=0.5, norm=3.0),
]


def test_ratios_are_to_torchvision_s_contiguous_resnet50_within_a_repeat():
    titles, _, theirs, revnet, of_vgg = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in networks.table(ROWS).splitlines()
    )

    assert titles[:6] == ["network", "k", "parameters", "GMAC", "contiguous", "channels-last"]
    assert theirs[:6] == [
        "torchvision's resnet50",
        "",
        "2.0 M",
        "1",
        "1 (1 - 1)",
        "1.2 (1.2 - 1.2)",
    ]
    assert of_vgg[:6] == ["VGG19-BN", "4", "2.0 M", "2", "", "0.825 (0.75 - 0.9)"]
    assert revnet[5] == "1.8 (1.8 - 1.8)"


def test_equal_gmacs_and_the_peak_are_of_the_work_done():
    by_name = {line.split("|")[1].strip(): line for line in networks.table(ROWS).splitlines()}
    cells = [each.strip() for each in by_name["RevNet50, reversible"].strip("|").split("|")]
    speed = (0.54 + 1.08) / 2  # 180 and 360 images/s of 3 GFLOP

    assert networks.at_equal_gmacs(ROWS, ROWS[-1]) == pytest.approx([0.75, 0.75])
    assert cells[6:] == ["0.75 (0.75 - 0.75)", result.number(speed), "45%", "12.5"]


def test_who_is_slower_at_equal_gmacs_is_told_with_where_its_time_goes():
    (said,) = networks.why_slower(ROWS)

    assert said.startswith("RevNet50, reversible, k = 4, channels-last: 0.75 of the speed of")
    assert "norm 6 ms (1)" in said


# ---- The command --------------------------------------------------------------------------------


def test_a_run_writes_a_result_whose_table_can_be_printed_again(tmp_path, capsys):
    out = tmp_path / "networks.json"
    asked = ["networks", "vgg19", "--quick", "--widenings", "1", "--side", "32", "--batch", "2"]
    asked += ["--variants", "channels-last", "--out", str(out), "--threads", "1"]
    threads = torch.get_num_threads()
    code = main(asked)
    printed = capsys.readouterr().out
    found = result.read(out)

    assert code == 0
    assert torch.get_num_threads() == threads
    assert [row.name for row in found.rows] == [
        MATMUL,
        f"{REFERENCE}, channels-last",
        "vgg19, channels-last",
    ]
    assert found.rows[2].extra["parameters"] == network_step.counts("vgg19", 1, 32).parameters
    assert networks.table(found.rows) in printed
    assert main(["networks", "--table", str(out)]) == 0
    assert networks.table(found.rows) in capsys.readouterr().out


def test_a_network_that_does_not_fit_the_memory_is_left_out_and_the_others_are_written(
    tmp_path, capsys, monkeypatch
):
    measure = Stepper.activations

    def activations(self):
        if isinstance(self.network, vgg.Backbone):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(self)

    monkeypatch.setattr(Stepper, "activations", activations)
    out = tmp_path / "networks.json"
    asked = ["networks", "vgg19", "--quick", "--widenings", "1", "--side", "32", "--batch", "2"]
    asked += ["--variants", "contiguous", "--out", str(out), "--threads", "1"]

    assert main(asked) == 0
    said = "k = 1, vgg19, contiguous: left out, 2 images don't fit the memory."
    assert said in capsys.readouterr().out
    assert said in result.read(out).conclusions


def test_a_k_whose_networks_do_not_fit_together_costs_no_other_k(tmp_path, monkeypatch):
    alternate = networks.method.alternate
    turns = []

    def once(contenders, **how):
        turns.append(len(contenders))
        if len(turns) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return alternate(contenders, **how)

    monkeypatch.setattr(networks.method, "alternate", once)
    out = tmp_path / "networks.json"
    asked = ["networks", "torchvision", "--quick", "--widenings", "1,2", "--side", "32"]
    asked += ["--batch", "2", "--variants", "contiguous", "--out", str(out), "--threads", "1"]

    assert main(asked) == 0
    found = result.read(out)
    assert {row.group for row in found.rows} == {"k = 1"}
    assert found.conclusions[-1].startswith("k = 2: left out")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["vgg"], "no network 'vgg'; did you mean 'vgg19'?"),
        (["googol"], f"no network 'googol'; there are {', '.join(NETWORKS)}"),
        (["--widenings", "0"], "--widenings (0) must be at least 1; K19's are 4,8,12,16"),
        (["--widenings", "four"], "--widenings (four) must be whole numbers: 4,8,12,16"),
        (["--variants", "fused"], "must be one or more of contiguous,channels-last,compiled"),
        (["--side", "0"], "--side (0) must be at least 1"),
        (["--batch", "1"], "--batch (1) must be at least 2: norms need two values"),
        (["v2", "--side", "16"], "--side (16), v2: images of 16 x 16 pixels are too small"),
        (["vgg19", "--side", "16"], "--side (16), vgg19: "),
        (["--table", "/nowhere.json"], "/nowhere.json: can't be read"),
    ],
)
def test_what_can_t_be_measured_is_told_in_a_line(given, message, capsys):
    assert main(["networks", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()

    assert line.startswith("python -m benchmarks networks: ")
    assert message in line


def test_without_a_compiler_the_compiled_variant_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")

    assert main(["networks"]) == 2
    assert "needs a C++ compiler, and there is no no-such-compiler" in capsys.readouterr().err
