"""Files never run code: nothing that a checkpoint names is imported, called or opened.

The canary is ``hostile_library``, on the path: importing it or calling what is in it leaves a file.
"""

from __future__ import annotations

import ast
import copy
import sys
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.cli.main import main
from lightning_peft.core import untrusted as regex
from lightning_peft.core.registry import method_of_file
from lightning_peft.core.state.state_dict import StateError
from lightning_peft.tasks import ImageClassifier, TextClassifier
from tests.cli.modules import Data, Module

CANARY = """from pathlib import Path
Path("it_ran").touch()
def run(*args, **kwargs): Path("it_ran").touch()
class Evil:
    def __init__(self, *args, **kwargs): run()
"""


class Open(Module):
    """Takes arguments of every kind: plain values, code, and values without a declared type."""

    def __init__(
        self,
        width: int = 16,
        lr: float = 1e-2,
        act: Callable[..., Any] | None = None,
        body: nn.Module | None = None,
        act_or_name: Callable[..., Any] | str = "relu",
        untyped=None,
        options: dict[str, Any] | None = None,
        text: str = "plain",
    ) -> None:
        super().__init__(width, lr)
        self.save_hyperparameters()
        self.act = act


SPEC = {"class_path": "hostile_library.Evil"}
HOSTILE = {
    "a class to build": {"body": SPEC},
    "a class's path": {"body": "hostile_library.Evil"},
    "a configuration file": {"body": "evil.yaml"},
    "a callable": {"act": "hostile_library.run"},
    "a callable or a name": {"act_or_name": "hostile_library.run"},
    "untyped": {"untyped": SPEC},
    "untyped, as YAML": {"untyped": "class_path: hostile_library.Evil"},
    "inside of a dictionary": {"options": {"a": [{"b": SPEC}]}},
    "inside of a dictionary, as YAML": {"options": {"a": "class_path: hostile_library.Evil"}},
    "for Hydra": {"options": {"_target_": "hostile_library.run"}},
    "a string": {"text": "hostile_library.run"},
    "an entry point": {"text": "hostile_library:run"},
    "a list in itself": {"options": {"a": (lambda found: found.append(found) or found)([])}},
}
LORA = ["--trainer.callbacks+=LoRA", "--trainer.callbacks.r=2", "--trainer.callbacks.trainable=[head]"]
OPEN = "--model=tests.formats.test_untrusted.Open"
RUN = [OPEN, "--data=tests.cli.modules.Data", "--trainer.accelerator=cpu", *LORA]
RUN += ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.max_steps=9"]
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
ENTRIES = {
    "load_from_checkpoint": lambda path: lp.load_from_checkpoint(Open, path),
    "merge": lambda path: main(["merge", path, "out", OPEN]),
    "export": lambda path: main(["export", path, "out", OPEN]),
    **{name: lambda path, name=name: main([name, *RUN, f"--ckpt_path={path}"]) for name in ("fit", "test", "validate")},
}


@pytest.fixture(autouse=True)
def _canary(monkeypatch):
    monkeypatch.syspath_prepend(".")
    Path("hostile_library.py").write_text(CANARY)
    Path("evil.yaml").write_text("class_path: hostile_library.Evil\n")
    yield
    assert "hostile_library" not in sys.modules
    assert not Path("it_ran").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("run") / "run.ckpt"
    trainer = L.Trainer(callbacks=[lp.LoRA(r=2, trainable=["head"])], max_steps=1, enable_checkpointing=False, **QUIET)
    trainer.fit(Open(), Data())
    trainer.save_checkpoint(path)
    return torch.load(path, weights_only=True)


def saved(trained: dict[str, Any], **hyper_parameters: Any) -> str:
    torch.save({**trained, "hyper_parameters": {"width": 16, **hyper_parameters}}, "hostile.ckpt")
    return "hostile.ckpt"


def refused(call: Callable[[str], Any], path: str) -> str:
    with pytest.raises((StateError, lp.FormatError, lp.TargetError, SystemExit)) as stop:
        call(path)
    return str(stop.value)


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("entry", ["load_from_checkpoint", "test", "merge"])
def test_hyperparameters_that_name_code(trained, entry, value):
    said = refused(ENTRIES[entry], saved(trained, **value))
    assert f"--model.{next(iter(value))}=..." in said
    assert "hostile.ckpt" in said


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_point(trained, entry):
    said = refused(ENTRIES[entry], saved(trained, act="hostile_library.run"))
    assert "--model.act=..." in said


@pytest.mark.parametrize("entry", ["load_from_checkpoint", "merge", "export"])
def test_the_network_of_an_image_classifier(trained, entry):
    network = {"network": "hostile_library.run", "network_args": {"command": "x"}, "num_classes": 2}
    said = {"_class_path": "lightning_peft.tasks.ImageClassifier", "_instantiator": "hostile_library.run"}
    path = saved(trained, **network, **said)
    call = {
        "load_from_checkpoint": lambda path: lp.load_from_checkpoint(ImageClassifier, path),
        "merge": lambda path: main(["merge", path, "out"]),
        "export": lambda path: main(["export", path, "out", "--model=ImageClassifier"]),
    }[entry]
    assert "--model.network=..." in refused(call, path)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("hostile_library.Evil", "only if you trust the file and that code"),
        ("lightning_peft.tasks.hostile_library", "only if you trust the file and that code"),
        *((said, "such as --model my.package.Module") for said in (3, None, "Evil", "__main__.Evil", "a.b; rm -r /")),
    ],
)
def test_a_class_path_is_looked_up_among_the_tasks_of_this_package(trained, said, why):
    error = refused(lambda path: main(["merge", path, "out"]), saved(trained, _class_path=said))
    assert error.endswith(why)
    assert f"--model {said}" not in error


class OneArgument(Module):
    def __init__(self, args: Namespace | None = None) -> None:
        super().__init__()


def test_all_hyperparameters_as_one_argument(trained):
    hyper_parameters = {"width": 16, "act": "hostile_library.run"}
    torch.save({**trained, "hyper_parameters": hyper_parameters, "hparams_name": "args"}, "hostile.ckpt")
    said = refused(lambda path: lp.load_from_checkpoint(OneArgument, path), "hostile.ckpt")
    assert "--model.args=..." in said


@pytest.mark.parametrize("hyper_parameters", [3, "text", [1], {1: 2}])
def test_hyperparameters_that_are_not_a_dictionary(trained, hyper_parameters):
    torch.save({**trained, "hyper_parameters": hyper_parameters}, "hostile.ckpt")
    assert "are not a dictionary of arguments by name" in refused(ENTRIES["load_from_checkpoint"], "hostile.ckpt")
    assert "are not a dictionary of arguments by name" in refused(ENTRIES["test"], "hostile.ckpt")


def test_arguments_of_the_user_are_used_and_a_difference_causes_a_warning(trained, recwarn):
    path = saved(trained, act="hostile_library.run", lr=0.5)
    module = lp.load_from_checkpoint(Open, path, act=torch.tanh, lr=0.25)
    assert module.act is torch.tanh
    assert module.hparams.lr == 0.25
    said = [str(warning.message) for warning in recwarn]
    assert any("lr=0.25 was given and is used; hostile.ckpt was saved with 0.5" in text for text in said)
    recwarn.clear()
    main(["test", *RUN, "--model.act=torch.tanh", "--model.lr=0.125", f"--ckpt_path={path}"])
    said = [str(warning.message) for warning in recwarn]
    assert any("lr=0.125 was given and is used; hostile.ckpt was saved with 0.5" in text for text in said)


def test_plain_values_come_from_the_file_and_explicit_ones_stay(trained, monkeypatch):
    built = []
    monkeypatch.setattr(Open, "setup", lambda self, stage: built.append(dict(self.hparams)))
    path = saved(trained, lr=0.5, options={"a": [1, "two"]}, text="a plain text", untyped=3)
    main(["test", *RUN, "--model.text=mine", f"--ckpt_path={path}"])
    assert {k: built[0][k] for k in ("lr", "options", "text", "untyped")} == {
        "lr": 0.5,
        "options": {"a": [1, "two"]},
        "text": "mine",
        "untyped": 3,
    }


def test_merge_takes_classes_and_callables_from_the_user(trained):
    path = saved(trained, act="hostile_library.run", body=SPEC)
    body = ["--model.body=torch.nn.Linear", "--model.body.in_features=2", "--model.body.out_features=2"]
    main(["merge", path, "out", OPEN, "--model.act=torch.tanh", *body])
    assert Path("out/model.safetensors").is_file()


def manifest_says(trained: dict[str, Any], **config: Any) -> str:
    """A forged checkpoint without digests, whose method has these arguments."""
    manifest = copy.deepcopy(trained["lightning_peft"])
    del manifest["digests"]
    manifest["methods"][0]["config"].update(config)
    torch.save({**trained, "lightning_peft": manifest, "hyper_parameters": {}}, "hostile.ckpt")
    return "hostile.ckpt"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"targets": r"re:(.*)*(.*)*(.*)*(.*)*(.*)*!"}, "takes more than 0.5 seconds"),
        ({"targets": "re:("}, "regular expression"),
        ({"name": "../../x"}, "cannot name an adapter"),
        ({"r": 2**31}, "is above both sides"),
        ({"adapter_dtype": "load"}, "adapter_dtype must be one of"),
    ],
)
def test_arguments_of_methods(trained, monkeypatch, config, message):
    monkeypatch.setattr(regex, "LIMIT", 0.5)
    said = refused(ENTRIES["load_from_checkpoint"], manifest_says(trained, **config))
    assert message in said
    assert "hostile.ckpt" in said


def test_a_file_never_causes_a_tokenizer_lookup():
    found = method_of_file("PromptTuning", {"init": "text", "init_text": "x", "tokenizer": "hostile/repository"})
    assert (found.config()["init"], found.config()["tokenizer"]) == ("random", None)


def test_code_in_a_model_folder_is_not_run(trained):
    Path("folder").mkdir()
    Path("folder/config.json").write_text(
        '{"model_type": "evil", "auto_map": {"AutoConfig": "hostile_library.Evil"}, "architectures": ["Evil"]}'
    )
    Path("folder/hostile_library.py").write_text(CANARY)
    with pytest.raises(ValueError, match="trust_remote_code"):
        TextClassifier("folder")
    with pytest.raises(ValueError, match="code in model folders is never run"):
        TextClassifier("demo", config={"trust_remote_code": True})
    said = {"_class_path": "lightning_peft.tasks.TextClassifier", "config": {"trust_remote_code": True}}
    assert "--model.config=..." in refused(lambda path: main(["merge", path, "out"]), saved(trained, **said))


def test_an_archive_that_decompresses_or_declares_too_much_is_refused(trained):
    path = saved(trained)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile("hostile.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data + bytes(2**24) * name.endswith("data/0"))
    assert "compressed" in refused(ENTRIES["load_from_checkpoint"], "hostile.ckpt")
    torch.save({**trained, "huge": torch.zeros(1).expand(2**40)}, "hostile.ckpt")
    assert "is declared over" in refused(ENTRIES["load_from_checkpoint"], "hostile.ckpt")
    torch.save({**trained, "huge": bytearray(3)}, "hostile.ckpt")
    assert "bytearray" in refused(ENTRIES["load_from_checkpoint"], "hostile.ckpt")


#: every place where a value could become an import, a call or code, and why values from files cannot
SITES = {
    ("cli/main.py", "importlib.import_module"): "--import, which the user gives",
    ("cli/curves.py", "importlib.util.find_spec"): "matplotlib",
    ("cli/retention.py", "importlib.import_module"): "--retention.forward_fn, which the user gives",
    ("compare/report.py", "importlib.metadata.version"): "of packages named in this source",
    ("cli/serve.py", "importlib.import_module"): "--data, which the user gives",
    ("cli/module.py", "importlib.import_module"): "--model, which the user gives; the tasks of this package",
    ("tasks/vision.py", "pkgutil.resolve_name"): "ImageClassifier.network, which is from_user",
    ("formats/registry.py", "importlib.import_module"): "the converters of this package, in one of its folders",
    ("formats/registry.py", "pkgutil.iter_modules"): "the converters of this package, in one of its folders",
    ("methods/shared/quantizers.py", "importlib.import_module"): "bitsandbytes or torchao, checked by QuantizeBase",
    ("trainer/packages.py", "importlib.import_module"): "the two packages of Lightning",
    (
        "trainer/checkpoints/hyperparameters.py",
        "importlib.util.find_spec",
    ): "of a top-level name, which imports nothing",
    ("trainer/checkpoints/hyperparameters.py", "eval"): "an annotation in the source of the user's class",
    ("trainer/logs/monitor.py", "importlib.util.find_spec"): "matplotlib",
    ("core/state/torch_file.py", "torch.load"): "weights_only, after check_zip",
    ("trainer/checkpoints/unsafe_hparams.py", "torch.load"): "weights_only=True; False where the user passes it",
    (
        "trainer/checkpoints/manifest.py",
        "torch.load",
    ): "where the user passes weights_only=False to load_from_checkpoint",
    ("trainer/checkpoints/folder_reader.py", "torch.load"): "where the user passes weights_only=False to fit or test",
    ("trainer/checkpoints/sharded.py", "torch.load"): "where the user passes weights_only=False to fit or test",
    ("trainer/checkpoints/distributed_files.py", "torch.load"): "weights_only",
    ("core/state/moved_values.py", "pickle.dumps"): "writes",
    ("trainer/frozen_cache/callback.py", "pickle.dumps"): "compares two entries of the data; nothing is read back",
    (
        "core/injection/reset.py",
        "pickle.loads",
    ): "what core/state/moved_values.py wrote in this process; no file has it",
    ("trainer/checkpoints/distributed_files.py", "pickle.Unpickler"): "with a find_class of its own",
    ("core/untrusted.py", "subprocess.run"): "Python with a program in this source; the patterns are its input",
    ("core/untrusted.py", "re.compile"): "a pattern of a file, tried under a time limit",
    ("core/targeting/patterns.py", "re.compile"): "a pattern, after check_regexes where it is a file's",
}
#: calls that import, run, unpickle or compile, and those of re with a pattern that is not a literal
CALLS = (
    "importlib.",
    "pkgutil.",
    "runpy.",
    "pickle.",
    "subprocess.",
    "os.system",
    "os.popen",
    "torch.load",
    "marshal.",
)
NAMES = ("eval", "exec", "compile", "__import__")


def sites() -> set[tuple[str, str]]:
    root, found = Path(lp.__file__).parent, set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            bases = [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
            literal = (
                isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant | ast.JoinedStr)
            )
            concatenated = isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.BinOp)
            if call.startswith(CALLS) or call in NAMES or (call == "re.compile" and not literal and not concatenated):
                found.add((path.relative_to(root).as_posix(), call))
            found |= {(path.relative_to(root).as_posix(), base) for base in bases if base.startswith("pickle.")}
    return found


def test_every_place_that_could_run_code_is_known():
    found = {site for site in sites() if not site[0].startswith("demo/")}
    assert found - SITES.keys() == set(), "a new place where code is imported, run or unpickled: can a file reach it?"
    assert SITES.keys() - found == set(), "a place that is gone: take it from the list"
