"""Types of transformers' dense models beside Llama and Qwen: `scripts/survey_models.py` tries every one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from cispo.engines.engine import check_model
from cispo.errors import UserError
from cispo.policies.loading import init_policy, max_positions_of, save_policy
from tests.test_end_to_end import ROOT
from tests.tiny_policies import DENSE


@pytest.fixture(scope="module")
def survey() -> ModuleType:
    spec = importlib.util.spec_from_file_location("survey_models", ROOT / "scripts" / "survey_models.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["survey_models"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "kind", ["cohere", "cohere2", "gemma3_text", "granite", "hyperclovax", "minicpm3", "mistral", "olmo3"]
)
def test_packed_documents_have_the_logprobs_of_transformers(survey: ModuleType, kind: str):
    """Scaled logits, sliding windows above the documents' length, layer norms. float32: 1e-5 as for other policies."""
    assert survey.survey(kind).get("error", 1.0) <= 1e-5


def test_a_sliding_window_bounds_the_context(tmp_path: Path):
    """Its policies attend to all earlier tokens: the same up to the window's width."""
    kinds = ["full_attention", "sliding_attention"]
    windowed = {"model_type": "qwen3", **DENSE, "layer_types": kinds, "sliding_window": 16, "use_sliding_window": True}
    assert max_positions_of(windowed) == 16
    assert max_positions_of({**windowed, "layer_types": kinds[:1] * 2}) == 512
    assert max_positions_of({"sliding_window": 16, "use_sliding_window": False, "max_position_embeddings": 64}) == 64
    save_policy(init_policy(windowed, 0), tmp_path)
    check_model(str(tmp_path), 16)
    with pytest.raises(UserError, match="max_context 17"):
        check_model(str(tmp_path), 17)


def test_a_quantised_config_is_refused():
    """An engine would read it from the folder that training writes; updates bring weights as they are."""
    with pytest.raises(UserError, match=r"config.json has a quantization_config: .* copy in bfloat16"):
        init_policy({"model_type": "qwen3", **DENSE, "quantization_config": {"quant_method": "fp8"}}, 0)
