"""Figs. 1 and 2: the layers put together, and the baseline of Table 1."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from helpers import leaf, normal, parameters, relative_error

import net

B, C, SIZE, GRID, TYPES, D, J, E = 3, 2, 11, 4, 3, 5, 6, 7  # no axis passes for another
CHILDREN = GRID * GRID * TYPES
LABELS = torch.tensor([[5], [0], [2]])


def tiny(**changes):
    """A CapsNet whose numbers all differ, and which is the same each time."""
    torch.manual_seed(0)
    options = dict(in_channels=C, image_size=SIZE, num_classes=J, with_reconstruction=True)
    options |= dict(conv_channels=8, kernel_size=3, decoder_widths=(9, 12))
    options |= dict(primary_types=TYPES, primary_dim=D, digit_dim=E)
    return net.CapsNet(**(options | changes))


def tiny_images(count=B):
    return torch.rand(count, C, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def test_paper_has_8215568_parameters():
    assert parameters(net.CapsNet, with_reconstruction=True) == 8_215_568


def test_paper_without_the_decoder_has_6804224_parameters():
    assert parameters(net.CapsNet) == 6_804_224


def test_layers_alone_default_to_the_paper_s():
    with torch.device("meta"):
        model = net.CapsNet(with_reconstruction=True)
        primary, digit = net.PrimaryCaps(), net.DigitCaps(1152)
        alone = [model.conv1, primary, digit, net.Decoder(10, 16, (1, 28, 28))]
    shapes = [p.shape for layer in alone for p in layer.parameters()]
    assert shapes == [p.shape for p in model.parameters()]
    assert (primary.dim, primary.stride, digit.routing_iterations) == (8, 2, 3)


def test_baseline_has_35445522_parameters():
    assert parameters(net.BaselineCNN) == 35_445_522


# Primary capsules


def test_primary_capsule_is_squashed_from_consecutive_channels_at_one_place():
    layer = tiny().double().primary_caps
    features = normal(B, 8, 9, 9)
    maps = F.conv2d(features, layer.weight.permute(3, 2, 0, 1), layer.bias, stride=2)
    expected = [
        reference.squash(maps[n, t * D : (t + 1) * D, row, column].tolist())
        for n in range(B)
        for row in range(GRID)
        for column in range(GRID)
        for t in range(TYPES)
    ]
    expected = torch.tensor(expected, dtype=torch.float64).view(B, CHILDREN, D)
    assert relative_error(layer(features), expected) < 1e-9


def test_features_that_one_place_sees_change_only_the_capsules_of_this_place():
    layer = tiny().primary_caps
    features = normal(1, 8, 9, 9).float()
    changed = features.clone()
    changed[:, :, 0, 0] += 1  # the corner lies in the receptive field of one place
    moved = ((layer(features) - layer(changed)).abs() > 1e-6).any(dim=2)
    assert moved.sum() == TYPES


def test_primary_capsules_see_features_after_a_relu():
    model, images = tiny(), tiny_images()
    seen = []
    model.primary_caps.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.primary(images)
    assert torch.equal(seen[0], model.conv1(images).clamp(min=0))


def test_numbers_in_primary_capsules_are_of_both_signs():
    u = tiny().primary(tiny_images())
    assert 0.3 < (u < 0).float().mean() < 0.7


# Digit capsules


def test_weight_holds_a_matrix_for_each_parent_and_child():
    assert tiny().digit_caps.weight.shape == (J, CHILDREN, D, E)


def test_matrices_begin_normal_with_a_deviation_of_a_tenth():
    torch.manual_seed(0)
    weight = net.DigitCaps(1152).weight.detach()
    assert weight.std() == pytest.approx(0.1, rel=0.01)
    assert weight.mean() == pytest.approx(0, abs=0.001)
    assert (weight.abs() > 0.2).float().mean() == pytest.approx(0.0455, rel=0.02)  # not cut off


def test_matrix_takes_its_child_to_its_parent():
    layer = net.DigitCaps(CHILDREN, D, J, E, routing_iterations=1).double()
    u, matrix = normal(B, CHILDREN, D), normal(D, E, seed=1)
    with torch.no_grad():
        layer.weight.zero_()[4, 9] = matrix
    expected = torch.zeros(B, J, E).double()
    expected[:, 4] = net.squash(u[:, 9] @ matrix / J)
    assert relative_error(layer(u)[0], expected) < 1e-9


def test_lengths_equal_those_that_the_oracle_routes():
    model, images = tiny().double(), tiny_images().double()
    with torch.no_grad():
        model.digit_caps.weight *= 20  # long enough for each iteration to matter
    weight = model.digit_caps.weight.tolist()
    capsules = [reference.routing(u, weight, 3)[0] for u in model.primary(images).tolist()]
    expected = [[math.sqrt(reference.dot(v, v)) for v in example] for example in capsules]
    assert relative_error(model(images).lengths, expected) < 1e-9


# Reconstruction


def test_decoder_is_two_relus_and_a_sigmoid_on_the_capsule_of_the_label():
    decoder, capsules, labels = tiny().decoder, normal(B, J, E).float(), LABELS
    x = torch.zeros(B, J, E)
    x[range(B), labels.squeeze(1)] = capsules[range(B), labels.squeeze(1)]
    weights = list(decoder.parameters())
    x = F.linear(x.flatten(1), *weights[:2]).clamp(min=0)
    x = F.linear(x, *weights[2:4]).clamp(min=0)
    expected = 1 / (1 + (-F.linear(x, *weights[4:])).exp())
    assert relative_error(decoder(capsules, labels).flatten(1), expected) < 1e-6


def test_reconstruction_trains_the_layers_below():
    model = tiny()
    model(tiny_images(), LABELS).reconstruction.sum().backward()
    below = [model.conv1, model.primary_caps, model.digit_caps]
    assert all(p.grad is not None and p.grad.any() for layer in below for p in layer.parameters())


def test_reconstruction_lies_between_0_and_1():
    model = tiny()
    with torch.no_grad():
        model.decoder.layers[-1].weight *= 1000  # far out of bounds but for the sigmoid
    drawn = model(tiny_images()).reconstruction
    assert 0 <= drawn.min() < 0.01 and 0.99 < drawn.max() <= 1


def test_reconstruction_without_a_decoder_is_none():
    assert tiny(with_reconstruction=False)(tiny_images()).reconstruction is None


def test_capsule_of_another_class_cannot_touch_the_reconstruction():
    decoder, labels = tiny().decoder, LABELS
    capsules, others = normal(B, J, E).float(), normal(B, J, E, seed=1).float()
    others[range(B), labels.squeeze(1)] = capsules[range(B), labels.squeeze(1)]
    assert torch.equal(decoder(others, labels), decoder(capsules, labels))


def test_reconstruction_has_a_gradient_in_the_capsule_of_the_label_alone():
    capsules, labels = leaf(normal(B, J, E), torch.float32), LABELS
    tiny().decoder(capsules, labels).sum().backward()
    assert torch.equal(capsules.grad.any(dim=2), F.one_hot(labels.squeeze(1), J).bool())


def test_label_says_which_capsule_is_drawn():
    model, images = tiny(), tiny_images(1).expand(J, -1, -1, -1)
    drawn = model(images, torch.arange(J).unsqueeze(1)).reconstruction
    assert len(drawn.flatten(1).unique(dim=0)) == J


def test_without_labels_the_longest_capsule_is_drawn():
    model, images = tiny(), tiny_images()
    longest = model(images).lengths.argmax(dim=1, keepdim=True)
    assert torch.equal(model(images).reconstruction, model(images, longest).reconstruction)


def test_training_draws_the_capsule_of_the_label():
    model, images = tiny(), tiny_images()
    labels = (model(images).lengths.argmax(dim=1, keepdim=True) + 1) % J
    digits = images.unsqueeze(1)
    expected = net.reconstruction_loss(digits, model(images, labels).reconstruction)
    _, sums = net.Objective(model, "fp32")(images, digits, labels)
    assert sums[net.RECONSTRUCTION] == pytest.approx(expected.sum().item(), rel=1e-6)


def test_evaluate_draws_the_longest_capsule_whatever_the_label():
    model, images = tiny(), (255 * tiny_images()).byte()
    drawn = model(images.float() / 255).reconstruction
    expected = net.reconstruction_loss(images.unsqueeze(1).float() / 255, drawn)
    for label in range(J):
        sums = net.evaluate(model, net.Digits(images, torch.full((B,), label)), B)
        assert sums[net.RECONSTRUCTION] == pytest.approx(expected.sum().item(), rel=1e-6)


def test_total_loss_is_the_margin_loss_and_a_2000th_of_the_reconstruction_loss():
    model, images, labels = tiny(), tiny_images(), LABELS
    output = model(images, labels)
    margin = net.margin_loss(output.lengths, labels)
    digits = images.unsqueeze(1)
    reconstruction = net.reconstruction_loss(digits, output.reconstruction)
    expected = torch.stack([margin + 0.0005 * reconstruction, margin, reconstruction])
    assert relative_error(model.losses(output, digits, labels), expected) < 1e-6


def test_total_loss_without_a_decoder_is_the_margin_loss():
    model, images, labels = tiny(with_reconstruction=False), tiny_images(), LABELS
    output = model(images)
    margin = net.margin_loss(output.lengths, labels)
    expected = torch.stack([margin, margin, torch.zeros(B)])
    assert torch.equal(model.losses(output, images.unsqueeze(1), labels), expected)


# Fig. 4

CAPSULES, DELTAS = normal(J, E), torch.arange(-5, 6) * 0.05


def test_perturbation_is_added_to_one_number_at_a_time():
    moved = net.perturb(CAPSULES, 4, DELTAS)[:, :, 4] - CAPSULES[4]  # (E, K, E)
    expected = torch.einsum("ef,k->ekf", torch.eye(E), DELTAS)
    assert relative_error(moved, expected) < 1e-6


def test_perturbation_changes_no_other_capsule():
    others = torch.tensor([0, 1, 2, 3, 5])
    grid = net.perturb(CAPSULES, 4, DELTAS)
    assert torch.equal(grid[:, :, others], CAPSULES[others].expand(E, 11, -1, -1))


def test_perturbation_does_not_change_its_argument():
    capsules = CAPSULES.clone()
    net.perturb(capsules, 4, DELTAS)
    assert torch.equal(capsules, CAPSULES)


def test_perturbation_is_made_on_the_device_of_the_capsules():
    assert net.perturb(CAPSULES.to("meta"), 4, DELTAS).device.type == "meta"


# Other sizes and precisions


@pytest.mark.parametrize("classes", [1, 2, 100])
def test_colour_images_of_any_number_of_classes(small, classes):
    output = net.CapsNet(3, 32, classes, with_reconstruction=True)(torch.rand(2, 3, 32, 32))
    assert output.lengths.shape == (2, classes)
    assert output.reconstruction.shape == (2, 1, 3, 32, 32)


def test_batch_of_no_images_gives_no_lengths_and_no_loss():
    model, images, labels = tiny(), tiny_images(0), torch.zeros(0, 1, dtype=torch.int64)
    output = model(images)
    assert output.lengths.shape == (0, J)
    assert model.losses(output, images.unsqueeze(1), labels).shape == (3, 0)


def test_image_of_17_pixels_is_large_enough(small):
    assert net.CapsNet(image_size=17)(torch.rand(2, 1, 17, 17)).lengths.shape == (2, 10)


@pytest.mark.parametrize("size", [1, 15, 16])
def test_image_of_fewer_pixels_is_refused(small, size):
    with pytest.raises(ValueError, match=f"{size} px"):
        net.CapsNet(image_size=size)


@pytest.mark.parametrize("model", [net.CapsNet, net.BaselineCNN, net.MultiBaselineCNN])
def test_weights_of_convolutions_lie_channels_last(model):
    with torch.device("meta"):
        layers = model(in_channels=3).modules()
    weights = [layer.weight for layer in layers if isinstance(layer, torch.nn.Conv2d)]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_gradients_reach_every_parameter():
    model, images, labels = tiny(), tiny_images(), LABELS
    model.losses(model(images, labels), images.unsqueeze(1), labels)[0].sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_results_under_autocast_to_bfloat16_are_float32():
    model, images, labels = tiny(), tiny_images(), LABELS
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images, labels)
    results = [*output, model.losses(output, images.unsqueeze(1), labels)]
    assert [x.dtype for x in results] == 4 * [torch.float32]


def test_lengths_under_autocast_to_bfloat16_are_near_those_in_float32():
    model, images = tiny(), tiny_images()
    with torch.autocast("cpu", torch.bfloat16):
        lengths = model(images).lengths
    assert relative_error(lengths, model(images).lengths) < 0.05


def test_routing_under_autocast_reads_bfloat16(monkeypatch):
    read = []
    monkeypatch.setattr(net, "routing", lambda u, weight, _: read.extend((u, weight)))
    with torch.autocast("cpu", torch.bfloat16):
        net.DigitCaps(2)(normal(1, 2, 8).float())
    assert [x.dtype for x in read] == 2 * [torch.bfloat16]


def test_pixels_under_autocast_are_not_rounded_to_bfloat16():
    with torch.autocast("cpu", torch.bfloat16):
        drawn = tiny()(tiny_images(), LABELS).reconstruction
    assert not torch.equal(drawn, drawn.bfloat16().float())


def test_exported_model_takes_batches_of_another_size():
    model = tiny().eval()
    shapes = {"images": {0: torch.export.Dim.DYNAMIC}}
    exported = torch.export.export(model, (tiny_images(4),), dynamic_shapes=shapes).module()
    assert relative_error(exported(tiny_images(7)).lengths, model(tiny_images(7)).lengths) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_model_in_half_precision_draws(dtype):
    model, images = tiny().to(dtype), tiny_images().to(dtype)
    assert model(images).reconstruction.isfinite().all()


# The baseline


def baseline():
    torch.manual_seed(0)
    return net.BaselineCNN(in_channels=3, image_size=8, num_classes=7), torch.rand(2, 3, 8, 8)


@pytest.mark.parametrize("K", [1, 2])
def test_logits_and_loss_of_the_baseline_under_autocast_are_float32(K):
    model, images = baseline()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images)
    losses = model.losses(output, None, torch.tensor([[6, 0], [1, 2]])[:, :K])
    assert output.lengths.dtype == losses.dtype == torch.float32


def test_baseline_has_a_relu_after_each_layer_and_dropout_before_the_last():
    with torch.device("meta"):
        layers = net.BaselineCNN().layers
    kinds = ["Conv2d", "ReLU"] * 3 + ["Flatten"] + ["Linear", "ReLU"] * 2 + ["Dropout", "Linear"]
    assert [type(layer).__name__ for layer in layers] == kinds
    assert layers[-2].p == 0.5


def test_baseline_gives_a_logit_for_each_class():
    model, images = baseline()
    assert model(images).lengths.shape == (2, 7)


def test_baseline_trains_with_dropout():
    model, images = baseline()
    assert not torch.equal(model(images).lengths, model(images).lengths)


def test_baseline_is_tested_without_dropout():
    model, images = baseline()
    model.eval()
    assert torch.equal(model(images).lengths, model(images).lengths)


def test_loss_of_the_baseline_is_the_cross_entropy():
    model, images = baseline()
    output, labels = model(images), torch.tensor([6, 0])
    losses = model.losses(output, images, labels.unsqueeze(1))
    entropies = F.cross_entropy(output.lengths, labels, reduction="none").tolist()
    assert losses[0].tolist() == pytest.approx(entropies) and not losses[1:].any()
