"""Recipes: merging, refusals with the key's name, and that the shipped ones and the schema are right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cispo.errors import UserError
from cispo.recipe import migrate as migration
from cispo.recipe.load import dump_yaml, json_schema, known_keys, load_recipe, stored_recipe
from cispo.recipe.migrate import REMOVED, RENAMED, Removed, migrate
from cispo.recipe.schema import Recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
MINIMAL = "policy: {config: {model_type: minimax}, tokenizer: t}\n"


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_shipped_recipes(file: Path):
    recipe = load_recipe(file)
    assert recipe.name == file.stem and recipe.data and recipe.reward
    assert len(file.read_text().splitlines()) <= 70


def test_schema_is_fresh():
    """`python scripts/make_schema.py` writes it."""
    assert (ROOT / "recipes" / "schema.json").read_text() == json_schema()


def test_every_key_has_a_sentence():
    for key, info in known_keys():
        assert info.description and info.description.strip().endswith((".", "PPO and GRPO.")), key


def test_the_schema_stays_small():
    own = {key for key, _ in known_keys() if not key.startswith(("eval.", "sft.data."))}
    assert len(own) <= 165  # keys and their sections


def test_base_recipe_overrides_and_dump(tmp_path: Path):
    write(tmp_path, MINIMAL + "seed: 3\nlearner: {lr: 0.1, warmup_steps: 2}\n", "base.yaml")
    file = write(tmp_path, "base: base.yaml\nlearner: {lr: 0.2}\n")
    recipe = load_recipe(file, ["rollout.group_size=4", "learner.betas=[0.8, 0.9]"])
    assert recipe.seed == 3 and recipe.learner.lr == 0.2 and recipe.learner.warmup_steps == 2
    assert recipe.rollout.group_size == 4 and recipe.learner.betas == (0.8, 0.9)
    again = Recipe.model_validate(yaml.safe_load(dump_yaml(recipe)))
    assert again == recipe


def test_an_empty_mapping_replaces_and_others_merge(tmp_path: Path):
    """The arguments of a recipe's chat template are of no use to a policy with another one."""
    write(tmp_path, MINIMAL + "data: {source: 'a:b', args: {x: 1}, template_args: {think: false}}\n", "base.yaml")
    file = write(tmp_path, "base: base.yaml\ndata: {args: {y: 2}}\n")
    for items, left in ((["data.args={}", "data.args.z=3"], {"z": 3}), (["data.args.z=3", "data.args={}"], {})):
        emptied = load_recipe(file, items).data
        assert emptied is not None and emptied.args == left, "an emptied mapping is filled by later items alone"
    data = load_recipe(file, ["data.template_args={}"]).data
    assert data is not None and data.template_args == {} and data.args == {"x": 1, "y": 2}
    data = load_recipe(write(tmp_path, "base: base.yaml\ndata: {args: {}}\n"), ["data.args.z=3"]).data
    assert data is not None and data.template_args == {"think": False} and data.args == {"z": 3}


def test_paths_beside_the_recipe(tmp_path: Path):
    (tmp_path / "tok").mkdir()
    recipe = load_recipe(write(tmp_path, "policy: {config: {}, tokenizer: tok}\n"))
    assert recipe.policy.tokenizer == str(tmp_path / "tok")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learner: {lrr: 1}", r"unknown key learner.lrr \(did you mean learner.lr\?\)"),
        ("trian: {steps: 1}", r"unknown key trian"),
        (
            "reward: {functions: [{fn: a, wieght: 2}]}",
            r"unknown key reward.functions.0.wieght .*reward.functions.weight",
        ),
        ("learner: {lr: fast}", r"learner.lr = 'fast'"),
        ("learner: {lr: -1}", r"learner.lr = -1"),
        ("learner: {lr: .nan}", r"learner.lr = nan"),
        ("rollout: {engine: sglang}", r"rollout.engine = 'sglang'"),
        ("rollout: {top_p: 0.9}", r"unknown key rollout.top_p: truncated sampling makes the importance ratio wrong"),
        ("rollout: {top_k: 50}", r"unknown key rollout.top_k: truncated sampling .* it must stay 0"),
        ("rollout: {temperature: 0}", r"temperature must be above 0"),
        ("rollout: {max_tokens: 64, max_context: 64}", r"leaves no room"),
        ("rollout: {temperature: 0.7, max_tokens: 4000, max_context: 5000}", r"run_length"),
        ("rollout: {prompts_per_step: 5, group_size: 2}\nalgorithm: {updates_per_batch: 11}", r"the 10 completions"),
        ("rollout: {group_size: 1}\ncurriculum: {drop_above: 0.9}", r"curriculum.drop_above goes by .*group_size 1"),
        ("rollout: {group_size: 1}\ncurriculum: {weighting: difficulty}", r"curriculum.weighting: difficulty goes by"),
        ("curriculum: {drop_above: 1.5}", r"curriculum.drop_above = 1.5"),
        ("curriculum: {drop_above: 0}", r"curriculum.drop_above = 0"),
        ("curriculum: {weighting: hard}", r"curriculum.weighting = 'hard'"),
        ("curriculum: {length_stages: [[5, 100]]}", r"curriculum.length_stages must begin at step 0, not at step 5"),
        (
            "curriculum: {length_stages: [[0, 9], [7, 20], [7, 30]]}",
            r"length_stages must be in ascending order .*0, 7, 7",
        ),
        (
            "curriculum: {length_stages: [[0, 9], [7, 2000]]}",
            r"length_stages has 2000 tokens, rollout.max_tokens .*1024",
        ),
        ("curriculum: {length_stages: [[0, 0]]}", r"curriculum.length_stages.0.1 = 0"),
        ("curriculum: {length_stages: [[0]]}", r"key curriculum.length_stages.0.1 is missing"),
        ("curriculum: {length_stages: 512}", r"curriculum.length_stages = 512"),
        (
            "algorithm: {overlong_buffer: 200}\ncurriculum: {length_stages: [[0, 100], [9, 1000]]}",
            r"algorithm.overlong_buffer 200 is longer than the 100 tokens of a stage in curriculum.length_stages",
        ),
        (
            "rollout: {engine_args: {speculative_config: {method: eagle, num_speculative_tokens: 1}}}",
            r"engine_args.speculative_config.method must be ngram or mtp: other drafts \(EAGLE",
        ),
        ("rollout: {engine_args: {speculative_config: 3}}", r"engine_args.speculative_config.method must be ngram"),
        (
            "rollout: {engine_args: {speculative_config: {method: mtp}}}",
            r"key rollout.engine_args.speculative_config.num_speculative_tokens is missing",
        ),
        (
            "rollout: {engine: torch, engine_args: {speculative_config: {method: mtp, num_speculative_tokens: 1}}}",
            r"speculative_config is for vLLM: rollout.engine torch makes no drafts",
        ),
        (
            "rollout: {engine_args: {speculative_config: {method: mtp, num_speculative_tokens: true}}}",
            r"speculative_config.num_speculative_tokens = True: a whole number from 1 on",
        ),
        (
            "rollout: {engine_args: {speculative_config: {method: mtp, prompt_lookup_max: 2}}}",
            r"speculative_config.prompt_lookup_max must stay unset: drafts of method mtp have num_speculative_tokens",
        ),
        (
            "rollout: {engine_args: {speculative_config: {method: ngram, num_speculative_tokens: 3}}}",
            r"key rollout.engine_args.speculative_config.prompt_lookup_max is missing",
        ),
        (
            "rollout: {engine_args: {speculative_config: {method: ngram, num_speculative_tokens: 0}}}",
            r"speculative_config.num_speculative_tokens = 0: a whole number from 1 on",
        ),
        (
            "rollout: {engine_args: {speculative_config: {method: ngram, model: m}}}",
            r"speculative_config.model must stay unset: drafts of method ngram have num_speculative_tokens",
        ),
        (
            "rollout: {engine_args: {speculative_config: {method: ngram, num_speculative_tokens: 3, "
            "prompt_lookup_max: 2, prompt_lookup_min: 3}}}",
            r"speculative_config.prompt_lookup_min 3 is above prompt_lookup_max",
        ),
        (
            "rollout: {engine_args: {quantization: fp8}}",
            r"engine_args.quantization must stay unset: .*quantised engine",
        ),
        (
            "rollout: {engine_args: {hf_overrides: {quantization_config: {quant_method: fp8}}}}",
            r"engine_args.hf_overrides.quantization_config must stay unset",
        ),
        ("data: {split: a}", r"key data.source is missing"),
        ("name: a/b", r"name = 'a/b'"),
        ("seed: [1", r"not valid YAML"),
        ("base: nowhere.yaml", r"nowhere.yaml does not exist"),
    ],
)
def test_refusals_name_the_key(tmp_path: Path, text: str, message: str):
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(write(tmp_path, MINIMAL + text + "\n"))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("more", [{"method": "ngram", "prompt_lookup_max": 4}, {"method": "mtp"}])
def test_drafts_without_router_replay(more: dict[str, object], tmp_path: Path):
    given = {"num_speculative_tokens": 3, **more}
    file = write(tmp_path, MINIMAL + yaml.safe_dump({"rollout": {"engine_args": {"speculative_config": given}}}))
    assert load_recipe(file).rollout.engine_args["speculative_config"] == given
    with pytest.raises(UserError, match=r"speculative_config and policy.router_replay exclude each other"):
        load_recipe(file, ["policy.router_replay=rollout"])


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("policy: {}", "needs a model"),
        ("policy: {model: a, config: {}}", "exclude each other"),
        ("policy: {config: {}}", "policy.tokenizer is needed"),
    ],
)
def test_policy_needs_one_origin(tmp_path: Path, policy: str, message: str):
    with pytest.raises(UserError, match=message):
        load_recipe(write(tmp_path, policy + "\n"))


def test_a_file_takes_no_arguments_of_the_function_before(tmp_path: Path):
    """A user's data in the place of a shipped recipe's problems; another function still takes over seed and size."""
    base = "data: {source: 'rewards.sorting:problems', args: {size: 9}, limit: 5}\nsft: {data: {source: a.jsonl}}\n"
    write(tmp_path, MINIMAL + base, "base.yaml")
    (tmp_path / "rows.jsonl").touch()
    file = write(tmp_path, "base: base.yaml\n")
    data = load_recipe(file, ["data.source=rows.jsonl"]).data
    assert data is not None and (data.args, data.limit) == ({}, 5)
    data = load_recipe(file, ["data={source: 'rewards.sorting:worked'}"]).data
    assert data is not None and data.args == {"size": 9}
    data = load_recipe(file, ["data={source: owner/name, args: {revision: main}}"]).data
    assert data is not None and data.args == {"revision": "main"}


@pytest.mark.parametrize(("override", "message"), [("x", "key=value"), ("learner.lrr=2", "did you mean learner.lr")])
def test_bad_overrides(tmp_path: Path, override: str, message: str):
    with pytest.raises(UserError, match=message):
        load_recipe(write(tmp_path, MINIMAL), [override])


def test_a_shipped_recipe_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("quickstart", ["seed=3"])
    assert recipe.seed == 3 and Path(recipe.policy.tokenizer or "").is_dir()
    assert load_recipe(write(tmp_path, "base: quickstart\nname: mine\n")).policy == recipe.policy
    with pytest.raises(UserError, match="recipe quick does not exist; the shipped recipes are chase, code, compare, "):
        load_recipe("quick")
    (tmp_path / "quickstart").write_text(MINIMAL + "name: nearer\n")
    assert load_recipe("quickstart").name == "nearer"


@pytest.fixture
def renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two keys and a section of a recipe had other names."""
    for old, new in {"learner.rate": "learner.lr", "old.group": "rollout.group_size", "limits": "control"}.items():
        monkeypatch.setitem(RENAMED, old, new)
    migration._warn.cache_clear()


@pytest.mark.usefixtures("renamed")
def test_renamed_keys_are_read_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write(tmp_path, MINIMAL + "learner: {rate: 0.1}\nlimits: {watchdog: 7}\n", "base.yaml")
    file = write(tmp_path, "base: base.yaml\nold: {group: 4}\n")
    for overrides, lr in (((), 0.1), (("learner.rate=0.2",), 0.2), (("learner.lr=0.3",), 0.3)):
        recipe = load_recipe(file, overrides)
        assert (recipe.learner.lr, recipe.rollout.group_size, recipe.control.watchdog) == (lr, 4, 7)
    warnings = capsys.readouterr().err.splitlines()
    assert "cispo: warning: the recipe key learner.rate is read as learner.lr, its new name" in warnings
    assert len(warnings) == 3, "once each"
    with pytest.raises(UserError, match="learner.rate is the old name of learner.lr, and the recipe has both"):
        load_recipe(write(tmp_path, MINIMAL + "learner: {rate: 0.1, lr: 0.2}\n"))
    with pytest.raises(UserError, match="learner = 3"):
        load_recipe(write(tmp_path, MINIMAL + "learner: 3\nold: {group: 4}\n"))


@pytest.mark.usefixtures("renamed")
def test_the_recipe_of_an_earlier_version(tmp_path: Path):
    recipe = load_recipe(write(tmp_path, MINIMAL + "learner: {lr: 0.5}\n"))
    values = yaml.safe_load(dump_yaml(recipe))
    values["rollout"] |= {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
    values["learner"]["rate"] = values["learner"].pop("lr")
    del values["control"], values["train"]["keep"]
    before = yaml.safe_dump(values)
    assert stored_recipe(before, where="w") == recipe
    assert yaml.safe_load(before) == values
    values["rollout"]["top_p"] = 0.5
    with pytest.raises(UserError, match="^w: unknown key rollout.top_p: truncated sampling"):
        stored_recipe(yaml.safe_dump(values), where="w")
    with pytest.raises(UserError, match="recipe w is not valid YAML"):
        stored_recipe("a: [", where="w")


def test_a_section_can_be_removed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(REMOVED, "gone.key", Removed(3, "there is no other"))
    assert migrate({"gone": {"key": 3}, "seed": 1}, "w") == {"seed": 1}
    assert migrate({"gone": {"key": 4}}, "w") == {"gone": {"key": 4}}


def test_missing_recipe_and_folder(tmp_path: Path):
    with pytest.raises(UserError, match=r"nothere.yaml does not exist"):
        load_recipe(tmp_path / "nothere.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(tmp_path)


def test_schema_is_valid_json():
    schema = json.loads(json_schema())
    assert schema["properties"]["learner"] and "additionalProperties" in schema
