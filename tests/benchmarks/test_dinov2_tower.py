"""Weights of an exported network get their names in PyTorch back."""

from __future__ import annotations

import pytest
import torch

from benchmarks.mllm.dinov2_tower import read_onnx_weights


def test_matrices_of_an_onnx_file_get_their_names_and_their_direction_back(tmp_path):
    onnx = pytest.importorskip("onnx")
    matrix, bias = torch.arange(6.0).reshape(2, 3), torch.arange(3.0)
    product = onnx.helper.make_node(
        "MatMul", ["x", "onnx::MatMul_7"], ["y"], name="/backbone/layer.0/fc1/MatMul"
    )
    graph = onnx.helper.make_graph(
        [product], "g", [], [],
        [onnx.numpy_helper.from_array(matrix.numpy(), "onnx::MatMul_7"),
         onnx.numpy_helper.from_array(bias.numpy(), "backbone.layer.0.fc1.bias")],
    )  # fmt: skip
    onnx.save(onnx.helper.make_model(graph), tmp_path / "network.onnx")
    weights = read_onnx_weights(tmp_path / "network.onnx")
    # x @ matrix is torch's linear layer with the transposed weight.
    assert torch.equal(weights["backbone.layer.0.fc1.weight"], matrix.T)
    assert torch.equal(weights["backbone.layer.0.fc1.bias"], bias)
