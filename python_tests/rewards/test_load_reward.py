"""Finding a reward, and what is said when it cannot serve."""

import pytest

from rftcore import rewards
from rftcore.rewards import RewardSpecError


@pytest.fixture(autouse=True)
def user_module(tmp_path, monkeypatch):
    (tmp_path / "user_rewards.py").write_text(
        "from rftcore.rewards import declare\n"
        "@declare(differentiable=True, unit='points')\n"
        "def bright(images, prompts, metadata=None): return images\n"
        "def silent(images, prompts, metadata=None): return images\n"
        "number = 3\n"
        "@declare(differentiable=True)\n"
        "class Level:\n"
        "    def __init__(self, level): pass\n"
    )
    (tmp_path / "broken_rewards.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("spec", ["user_rewards.bright", "user_rewards:bright"])
def test_dotted_path(spec):
    reward = rewards.load(spec)
    assert (reward.name, reward.differentiable, reward.unit) == ("bright", True, "points")
    assert reward("images", ["a"]) == "images"


def test_known_name():
    assert rewards.load("digits").name == "digits"
    assert rewards.load("digits").differentiable
    assert not rewards.load("digits_held_out").differentiable


def test_config_declares_for_a_silent_function():
    assert rewards.load("user_rewards.silent", differentiable=True).differentiable
    assert not rewards.load_judge("user_rewards.silent").differentiable


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit", "did you mean 'digits'"),
        ("quality", "known names: .*digits, digits_held_out"),
        ("user_rewards.brigt", "did you mean 'bright'"),
        ("no_such_module.reward", "no module 'no_such_module'"),
        ("user_rewards.number", "int, not a function"),
        ("user_rewards.silent", "does not declare whether it is differentiable"),
        ("user_rewards.Level", r"needs level; set reward.options: {user_rewards.Level: {level: ...}}"),
        ("{digits: much}", "{name: weight, name: weight}, each weight a number"),
    ],
)
def test_errors_say_what_to_do(spec, message):
    with pytest.raises(RewardSpecError, match=message):
        rewards.load(spec)


def test_contradicting_declarations():
    with pytest.raises(RewardSpecError, match="declares differentiable=True"):
        rewards.load("user_rewards.bright", differentiable=False)


def test_a_failing_import_inside_the_module_keeps_its_own_error():
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        rewards.load("broken_rewards.reward")


def test_an_algorithm_that_needs_the_gradient_says_which_do_not():
    with pytest.raises(RewardSpecError, match="DRaFT follows the reward's gradient.*DDPO, DPOK"):
        rewards.check_differentiable(rewards.load("user_rewards.silent", differentiable=False), "DRaFT")


def test_an_option_nested_deeper_than_python_goes_is_refused():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RewardSpecError, match="option model=\\[.*it must be text"):
        rewards.load("aesthetic", options={"model": deep})


@pytest.mark.parametrize("name", ["aesthetic", "hpsv2"])
def test_a_model_by_a_name_that_no_file_can_have_is_refused(name):
    with pytest.raises(RewardSpecError, match="model='x+': there is no such f"):
        rewards.load(name, options={"model": "x" * 300})
