"""Options of the builder are granted or refused by the fact, for both libraries."""

from __future__ import annotations

import pytest

from edgeglm.compile.trtexec import trtexec_arguments
from edgeglm.core.errors import UserError
from edgeglm.core.recipe import EngineConfig, recipe_from_toml
from edgeglm.targets.build_options import BuildOptions, option_refusals, with_recipe
from edgeglm.targets.schema import (
    RuntimeVersion,
    load_target,
    resolve_target,
    resolved_from_toml,
    target_from_toml,
    toml_from_resolved,
)

ALL = BuildOptions(
    version_compatible=True, hardware_compatible=True, refit=True, weight_streaming=True, optimization_level=5
)


@pytest.mark.parametrize(
    ("library", "version", "sm", "refused"),
    [
        ("tensorrt", "10.13.3", 90, ()),
        ("tensorrt", "11.4.1", 87, ("no hardware compatibility on JetPack",)),
        ("tensorrt", "10.3.0", 75, ("begin with Ampere (SM 8.0) and this is SM 7.5",)),
        (
            "tensorrt",
            "8.5.2",
            72,
            (
                "version_compatible begins with TensorRT 8.6 and this is 8.5.2",
                "hardware_compatible begins with TensorRT 8.6",
                "weight_streaming begins with TensorRT 10.0",
                "optimization_level begins with TensorRT 8.6",
                "no hardware compatibility on JetPack",
                "begin with Ampere",
            ),
        ),
        ("tensorrt-rtx", "1.7.1", 89, ("ships no lean runtime", "overhears hardware_compatible")),
    ],
)
def test_each_release_refuses_what_it_has_not(library: str, version: str, sm: int, refused: tuple[str, ...]):
    found = list(option_refusals(ALL, library=library, version=version, sm=sm))
    assert len(found) == len(refused)
    for reason, words in zip(found, refused, strict=True):
        assert words in reason
        assert "; leave" in reason, "the remedy is the last clause"
    assert not list(option_refusals(BuildOptions(), library=library, version=version, sm=sm))


def test_a_profile_carries_its_options_into_the_bundle_and_a_mistyped_one_is_refused():
    text = toml_from_resolved(resolve_target(load_target("h100")))
    assert "engine" not in text, "a profile that asks for nothing says nothing"
    own = (
        text.split("[target]")[1].split("[[members]]")[0].replace("[[target.", "[[").replace("[target.", "[")
    )
    asked = target_from_toml(
        own + "\n[engine]\nrefit = true\nworkspace_bytes = 67108864\n", origin="own.toml"
    )
    assert asked.engine == BuildOptions(refit=True, workspace_bytes=64 << 20)
    back = resolved_from_toml(toml_from_resolved(resolve_target(asked)), origin="target.toml")
    assert back.members[0].engine == asked.engine
    with pytest.raises(UserError, match=r"own\.toml"):
        target_from_toml(own + "\n[engine]\noptimization_level = 9\n", origin="own.toml")
    cpu = 'name = "c"\ntitle = "C"\nkind = "cpu"\nbuilder = "onnxruntime"\nprecisions = ["fp32"]\n'
    with pytest.raises(UserError, match=r"ONNX Runtime builds no engine; remove \[engine\]"):
        target_from_toml(cpu + "[engine]\nrefit = true\n", origin="own.toml")


def test_a_recipe_asks_on_top_of_what_the_profile_asks():
    fields = BuildOptions.__struct_fields__
    assert EngineConfig.__struct_fields__ == fields, "one table, one set of keys"
    assert with_recipe(None, EngineConfig()) is None
    own = BuildOptions(refit=True, optimization_level=4)
    assert with_recipe(own, EngineConfig()) == own
    asked = EngineConfig(refit=False, usual_batch=16)
    assert with_recipe(own, asked) == BuildOptions(optimization_level=4, usual_batch=16)
    assert BuildOptions(usual_batch=16, largest_batch=64).batch == (1, 16, 64)
    family = resolve_target(load_target("jetson-agx"), EngineConfig(refit=True))
    assert all(member.engine == BuildOptions(refit=True) for member in family.members)
    back = resolved_from_toml(toml_from_resolved(family), origin="target.toml")
    assert back == family
    assert resolve_target(load_target("cpu"), EngineConfig(refit=True)).members[0].engine is None
    recipe = recipe_from_toml("[engine]\nlargest_batch = 64\n", origin="r", overrides=["engine.refit=true"])
    assert recipe.engine == EngineConfig(refit=True, largest_batch=64)
    with pytest.raises(UserError, match=r"engine\.largest_batch"):
        recipe_from_toml("[engine]\nlargest_batch = 8\n", origin="r")


def test_a_person_types_the_options_as_trtexec_spells_them():
    words = trtexec_arguments(
        "a.onnx",
        "a.plan",
        profile={},
        precision="fp16",
        runtime=RuntimeVersion(library="tensorrt", version="10.13.3", lane="B", source="the test"),
        options=BuildOptions(
            version_compatible=True, hardware_compatible=True, workspace_bytes=64 << 20, optimization_level=3
        ),
    )
    assert words[3:] == [
        "--stronglyTyped",
        "--versionCompatible",
        "--hardwareCompatibilityLevel=ampere+",
        "--memPoolSize=workspace:64",
        "--builderOptimizationLevel=3",
        "--skipInference",
    ]
