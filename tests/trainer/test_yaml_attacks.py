"""YAML files that try to do something: refused by a sentence, and nothing has happened."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributions import Distribution, kl
from torch.nn.modules import module as torch_module
from torch.optim import optimizer as torch_optimizer

from trainer.checkpoint import Checkpointer
from trainer.config.hyperparameters import Text, load_hparams

LINEAR = "m: !new:torch.nn.Linear [1, 1]\n"
SGD = f"{LINEAR}p: [!ref <m.weight>]\no: !new:torch.optim.SGD [!ref <p>, 0.1]\n"
CHECKPOINTER = "c: !new:trainer.Checkpointer [FOLDER]\n"
MVN = "m: !new:lhotse.dataset.signal_transforms.GlobalMVN [4]\n"
LOADER = "torch.utils.data.DataLoader"

# MARK is a file that must not come to be; FOLDER holds three checkpoints and a module `canary`.
ATTACKS: dict[str, list[str]] = {
    "process start": [
        "x: !apply:os.system ['touch MARK']",
        "x: !new:subprocess.Popen [[touch, MARK]]",
        "x: !apply:os.posix_spawn [/bin/touch, [touch, MARK], {}]",
        "x: !apply:torch.multiprocessing.spawn [!name:torch.relu ]",
        "x: !apply:multiprocessing.Process.run",
        f"x: !new:list [!new:{LOADER} {{dataset: [1, 2], num_workers: 2}}]",
        f"l: !new:{LOADER} {{dataset: [1, 2], num_workers: 1}}\nx: !new:dict [[!ref <l>]]",
        f"x: !new:torch.nn.ModuleList [!new:{LOADER} {{dataset: [1], num_workers: 1}}]",
        f"l: !new:{LOADER} {{dataset: [1], num_workers: 1}}\nx: !apply:trainer.data.pad [!ref <l>]",
        f"x: !name:trainer.data.collate [[!new:{LOADER} {{dataset: [1], num_workers: 1}}]]",
        f"x: !new:trainer.Checkpointer {{folder: x, recoverables: {{l: !new:{LOADER} [[1]]}}}}",
    ],
    "eval and exec": [
        'x: !apply:builtins.eval [\'open("MARK", "w")\']',
        'x: !apply:exec [\'open("MARK", "w")\']',
        "x: !name:eval",
        "x: !apply:compile ['1', a, eval]",
        "x: !apply:code.interact",
        'x: !new:timeit.Timer [\'open("MARK", "w")\']',
        "x: !apply:runpy.run_path [FOLDER/canary.py]",
    ],
    "wrappers of functions": [
        "x: !new:functools.partial [!name:torch.relu , 1]",
        "x: !apply:operator.methodcaller [save]",
        "x: !new:operator.attrgetter [__class__]",
        "x: !apply:functools.reduce [!name:max , [[1], [2]]]",
        "x: !new:map [!name:len , [a]]",
        "x: !apply:itertools.starmap [!name:max , [[1, 2]]]",
        "x: !new:types.MethodType [!name:len , [a]]",
        "x: !new:collections.defaultdict [!name:dict ]",
        "x: !apply:torch.nn.modules.container.operator.itemgetter [0]",
    ],
    "pickles": [
        "x: !apply:torch.load [FOLDER/weights.pt]",
        "x: !apply:pickle.loads [cos]",
        "x: !new:torch.package.PackageImporter [FOLDER/weights.pt]",
        "x: !apply:torch.serialization.load [FOLDER/weights.pt]",
        "x: !apply:numpy.load [FOLDER/weights.pt]",
        "x: !apply:torch.jit.load [FOLDER/weights.pt]",
        "x: !apply:lhotse.dataset.signal_transforms.GlobalMVN.from_file [FOLDER/weights.pt]",
    ],
    "imports": [
        "x: !apply:importlib.import_module [canary]",
        "x: !module:canary",
        "x: !name:canary.fire",
        "x: !apply:pydoc.locate [canary.fire]",
        "x: !apply:pkgutil.resolve_name ['canary:fire']",
        "x: !apply:torch.nn.functional.importlib.import_module [canary]",
        "x: !new:canary",
        "x: !apply:__import__ [canary]",
    ],
    "dunders and private names": [
        "x: !apply:torch.nn.Module.__subclasses__",
        "x: !apply:torch.nn.Linear.__init__.__globals__.get [os]",
        "x: !name:dict.__class__.__base__",
        "x: !apply:torch._utils._rebuild_tensor [1]",
        "x: !apply:torch.nn.modules.module._addindent [a, 1]",
        "x: !new:recipes.asr.data._Corpus",
        "x: !name:trainer.__loader__",
    ],
    "lookalike letters": [
        "x: !apply:\u043es.system ['touch MARK']",
        "x: !new:t\u043erch.nn.Linear [1, 1]",
        "x: !new:torch.nn.L\u0456near [1, 1]",
        "x: !apply:\uff4f\uff53.system ['touch MARK']",
        "x: !apply:os\u2024system ['touch MARK']",
        "x: !apply:os%2Esystem ['touch MARK']",
        "x: !apply:torch.nn\u200b.Linear [1, 1]",
    ],
    "re-exports": [
        "x: !apply:logging.os.system ['touch MARK']",
        "x: !apply:torch.os.system ['touch MARK']",
        "x: !apply:torch.nn.functional.torch.load [FOLDER/weights.pt]",
        "x: !apply:torch.utils.data.dataloader.os.system ['touch MARK']",
        "x: !apply:trainer.config.registry.importlib.import_module [canary]",
        "x: !apply:lhotse.dataset.sampling.simple.warnings.simplefilter [ignore]",
        "x: !name:torch.nn.modules.module.functools.partial",
        "x: !apply:torch.sys.modules.get [os]",
    ],
    "tags of Python": [
        "x: !!python/object/apply:os.system ['touch MARK']",
        "x: !!python/object/new:canary.Fire {}",
        "x: !!python/name:os.system ''",
        "x: !<tag:yaml.org,2002:python/module:canary> ''",
        "%TAG !p! tag:yaml.org,2002:python/\n---\nx: !p!object/apply:os.system ['touch MARK']",
        "x: (!!python/object/apply:os.system ['touch MARK'])",
        "? !!python/object/apply:os.system ['touch MARK']\n: 1",
        "x: !getattr [a, b]\n",
        "x: !attribute [a, real]\n",
    ],
    "other files": [
        "x: !include:/etc/passwd",
        "base: /etc/passwd",
        "base: FOLDER/payload.yaml",
        "x: !include:FOLDER/payload.yaml",
        "x: !include:demo.yaml",
        "x: !include:/dev/zero",
        "x: !include:FOLDER",
        "base: [FOLDER/payload.yaml]",
    ],
    "writing files": [
        "x: !apply:open [MARK, w]",
        f"{MVN}w: !apply:lhotse.dataset.signal_transforms.GlobalMVN.to_file [!ref <m>, MARK]",
        "x: !apply:torch.save [1, MARK]",
        "x: !new:lhotse.dataset.sampling.stateless.ManifestIndex [[FOLDER/weights.pt], MARK]",
        "x: !new:lhotse.dataset.sampling.StatelessSampler {cuts_paths: [a], index_path: MARK}",
        "x: !apply:torch.from_file [MARK, true, 10]",
        "x: !new:pathlib.Path [MARK]\ny: !ref <x.touch>",
        "x: !apply:trainer.checkpoint.storage.write [MARK]",
        "x: !new:logging.FileHandler [MARK]",
        "x: !new:torch.utils.data.datapipes.iter.FileOpener [[MARK], w]",
        "x: !new:trainer.loggers.JsonlLogger [FOLDER]",
        "x: !apply:recipes.common.synthesiser.load [FOLDER]",
    ],
    "checkpoints of another run": [
        f"{CHECKPOINTER}x: !apply:trainer.Checkpointer.save_checkpoint [!ref <c>]",
        f"{CHECKPOINTER}x: !apply:trainer.Checkpointer.save_and_keep_only [!ref <c>]",
        f"{CHECKPOINTER}x: !apply:trainer.checkpoint.checkpointer.Checkpointer.delete [!ref <c>]",
        f"{CHECKPOINTER}x: !ref <c.save_checkpoint>",
        f"{CHECKPOINTER}x: !name:trainer.checkpoint.Checkpointer.save_and_keep_only",
        "x: !apply:shutil.rmtree [FOLDER]",
    ],
    "downloads": [
        "x: !apply:torch.hub.load [a/b, c]",
        "x: !apply:torch.hub.load_state_dict_from_url ['http://127.0.0.1:9/x']",
        "x: !apply:urllib.request.urlopen ['http://127.0.0.1:9/x']",
        "x: !apply:torchaudio.models.decoder.download_pretrained_files [librispeech]",
        "x: !apply:torchaudio.pipelines.WAV2VEC2_BASE.get_model",
        "x: !new:torchaudio.datasets.YESNO {root: FOLDER, download: true}",
        "x: !apply:lhotse.recipes.download_yesno [FOLDER]",
    ],
    "hooks and registries of the process": [
        "x: !apply:torch.nn.modules.module.register_module_forward_hook [!name:torch.relu ]",
        "x: !apply:torch.nn.modules.module.register_module_full_backward_hook [!name:len ]",
        "x: !apply:torch.optim.optimizer.register_optimizer_step_pre_hook [!name:len ]",
        "x: !apply:torch.distributions.register_kl [!name:torch.distributions.Normal , a]",
        "x: !apply:torch.distributions.kl.register_kl [a, b]",
        "x: !apply:torch.utils.data.functional_datapipe.__call__ [a]",
        "x: !apply:torch.utils.data._utils.collate.default_collate_fn_map.update [{}]",
        "x: !apply:torch.distributions.Distribution.set_default_validate_args [false]",
        "x: !apply:torch.distributions.biject_to.register [a, b]",
        "x: !apply:atexit.register [!name:len ]",
        "x: !apply:torch.library.define ['a::b', '(Tensor x) -> Tensor']",
    ],
    "settings of the process": [
        "x: !apply:torch.set_default_dtype [!name:torch.float64 ]",
        "x: !apply:torch.set_num_threads [3]",
        "x: [!apply:torch.manual_seed [1]]",
        "x: {y: !apply:speechbrain.utils.seed_everything [1]}",
        "x: !apply:torch.manual_seed",
        "x: !name:torch.manual_seed [1]",
        "x: !apply:torch.manual_seed [!apply:os.system ['touch MARK']]",
        "x: !apply:torch.use_deterministic_algorithms [true]",
        "x: !new:torch.set_grad_enabled [false]",
        "x: !apply:torch.set_flush_denormal [true]",
        "x: !apply:torch.autograd.set_detect_anomaly [true]",
        "x: !apply:signal.signal [15, 1]",
        "x: !apply:recipes.common.children.serve {parent: 1}",
        "x: !apply:trainer.data.workers.start",
        "x: !apply:trainer.signals.install",
        "x: !apply:trainer.seed.seed_everything [1]",
        "x: !apply:os.chdir [FOLDER]",
        "x: !apply:os.putenv [A, b]",
        "x: !apply:sys.setrecursionlimit [100000]",
        "x: !apply:lhotse.set_caching_enabled [true]",
    ],
    "generators and frames": [
        "m: !new:trainer.metrics.Mean\nx: !ref <m.gi_frame>",
        f"{LINEAR}x: !ref <m.weight.grad_fn.next_functions>",
        "x: !apply:torch.nn.Module.parameters []\ny: !ref <x.gi_frame.f_builtins>",
        f"{LINEAR}x: !ref <m.parameters.func.gi_code>",
        "f: !name:torch.nn.functional.relu\nx: !ref <f.func_globals>",
        f"{LINEAR}x: !ref <m.named_parameters>",
        "f: !name:dict {a: 1}\nx: !ref <f.func>",
    ],
    "attributes": [
        f"{LINEAR}x: !ref <m.__init__.__globals__>",
        f"{LINEAR}x: !ref <m.__dict__>",
        f"{LINEAR}x: !ref <m._parameters>",
        f"{LINEAR}x: !ref <m.forward.__func__>",
        "d: !name:torch.float32\nx: !ref <d.to_complex>",
        f"l: !new:{LOADER} {{dataset: [1]}}\nx: !ref <l.collate_fn>",
        f"{SGD}x: !ref <o.__class__>",
        "m: !name:torch.nn.Linear\nx: !ref <m.mro>",
        f"{LINEAR}x: !ref <m.T_destination>",
    ],
    "bound methods": [
        f"{LINEAR}x: !ref <m.parameters>",
        f"{LINEAR}x: !ref <m.register_forward_hook>",
        f"{LINEAR}x: !ref <m.weight.register_hook>",
        f"{SGD}x: !ref <o.step>",
        "x: !new:list [[1]]\ny: !ref <x.append>",
        "a: text\nx: !ref <a.format>",
        "x: !new:torch.Generator\ny: !ref <x.manual_seed>",
        "s: !new:trainer.EpochCounter [3]\nx: !ref <s.load_state_dict>",
    ],
    "methods as names": [
        f"{LINEAR}x: !apply:torch.nn.Module.register_forward_hook [!ref <m>, !name:len ]",
        f"{LINEAR}x: !apply:torch.nn.Linear.forward [!ref <m>, 1]",
        f"{SGD}x: !apply:torch.optim.SGD.step [!ref <o>]",
        f"{SGD}x: !apply:torch.optim.Optimizer.register_step_post_hook [!ref <o>, !name:len ]",
        "x: !apply:dict.fromkeys [[a]]",
        "x: !apply:str.format ['{0.__class__}', a]",
        "x: !apply:torch.Tensor.apply_ [a, !name:len ]",
        "x: !apply:torch.Tensor.share_memory_ [a]",
        "x: !apply:torch.nn.SyncBatchNorm.convert_sync_batchnorm [a]",
        "x: !apply:recipes.asr.text.Pieces.train [a]",
    ],
    "functions handed to what calls them": [
        f"x: !new:{LOADER} {{dataset: ['open(MARK)'], batch_size: null, collate_fn: !name:eval }}",
        "x: !name:max {key: !name:os.system }",
        "x: !name:sorted {key: !name:builtins.exec }",
        f"{SGD}x: !new:torch.optim.lr_scheduler.LambdaLR [!ref <o>, !name:os._exit ]",
        "x: !new:torchaudio.transforms.Spectrogram {window_fn: !name:open }",
        f"{LINEAR}x: !new:torch.nn.TripletMarginWithDistanceLoss [!ref <m.to>]",
        "x: !name:torch.nn.functional.triplet_margin_with_distance_loss "
        "{distance_function: !name:torch.save }",
        f"x: !name:{LOADER} {{worker_init_fn: !name:os.kill }}",
        "x: !new:trainer.data.items.BadItemPolicy [!name:print ]",
        "x: !new:torch.utils.data.Subset {dataset: !module:os , indices: [system]}",
    ],
    "run folders and programs": [
        "x: !apply:trainer.main [!name:len ]",
        "x: !apply:trainer.launch [!name:len , {}, FOLDER]",
        "x: !apply:trainer.load_hparams {path: FOLDER/payload.yaml, allow: [os]}",
        "x: !new:trainer.cli.folder.RunFolder [FOLDER]",
        "x: !apply:recipes.asr.train.train [a]",
        "allow: [os]\nx: !apply:os.system ['touch MARK']",
    ],
}
# These are given as new values of keys, as by the command line.
OVERRIDES = [
    ("x", "!apply:os.system ['touch MARK']"),
    ("x", "!!python/object/apply:os.system ['touch MARK']"),
    ("y", "(!!python/object/apply:os.system ['touch MARK'])"),
    ("x", "!ref <net.parameters>"),
    ("x", "!include:FOLDER/payload.yaml"),
    ("net.in_features", '!apply:eval [\'open("MARK", "w")\']'),
    ("loader.num_workers", "!name:canary.fire"),
]
CANARY = """
from pathlib import Path
Path(__file__).with_suffix(".ran").write_text("imported")
def fire(*args, **kwargs): Path(__file__).with_suffix(".ran").write_text("called")
class Fire(list): pass
"""
# What a YAML may not cause, by the name of Python's audit event.
FORBIDDEN = {
    "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "os.putenv",
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chdir", "os.kill", "os.truncate",
    "shutil.rmtree", "socket.connect", "socket.getaddrinfo", "subprocess.Popen",
    "pickle.find_class", "code.__new__", "builtins.input", "signal.pthread_kill", "sys.settrace",
    "sys.setprofile",
}  # fmt: skip


class Witness:
    """Records forbidden events of this process while it is on; it cannot be removed again."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        writes = (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        )
        cache = writes and str(args[0]).rpartition(".")[2].startswith("pyc")  # of an import
        if (writes and not cache) or event in FORBIDDEN and not str(args[0]).endswith("pyc"):
            self.seen.append(f"{event} {args}")


WITNESS = Witness()


@pytest.fixture(scope="module")
def witness() -> Witness:
    import lhotse.dataset.sampling
    import lhotse.dataset.signal_transforms  # noqa: F401
    import torchaudio.models.decoder  # noqa: F401

    torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), 0.1)  # imports what it needs
    sys.addaudithook(WITNESS)
    return WITNESS


def process_state() -> dict[str, Any]:
    """Return what belongs to the process and could be changed by what a YAML calls."""
    hooks = [name for name in vars(torch_module) if name.startswith("_global_")]
    return {
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "hooks": [(n, len(v)) for n in hooks if hasattr(v := vars(torch_module)[n], "__len__")],
        "optimizer hooks": [
            len(torch_optimizer._global_optimizer_pre_hooks),
            len(torch_optimizer._global_optimizer_post_hooks),
        ],
        "divergences": len(kl._KL_REGISTRY),
        "validation": Distribution._validate_args,
        "torch": (
            torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.is_anomaly_enabled(), torch.are_deterministic_algorithms_enabled(),
        ),
        "seed": torch.initial_seed(),
        "python": (os.getcwd(), dict(os.environ), [*sys.path], sys.getrecursionlimit()),
        "threads": threading.active_count(),
    }  # fmt: skip


@pytest.fixture
def refused(
    tmp_path: Path, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., None]]:
    """Return a function that loads a YAML, and checks that it is refused and did nothing."""
    folder = tmp_path / "other"
    checkpointer = Checkpointer(folder / "run", keep_last=3)
    checkpointer.add_recoverable("net", torch.nn.Linear(1, 1))
    for _ in range(3):
        checkpointer.save_checkpoint()
    (folder / "canary.py").write_text(CANARY)
    mark = tmp_path / "mark"
    (folder / "payload.yaml").write_text(f"y: !apply:os.system ['touch {mark}']\n")
    (folder / "weights.pt").write_bytes(b"cos\nsystem\n(Vtouch " + str(mark).encode() + b"\ntR.")
    monkeypatch.syspath_prepend(str(folder))
    # A program that imports it may name it, and other tests of this process may have done so.
    monkeypatch.delitem(sys.modules, "speechbrain", raising=False)

    def placed(text: str) -> str:
        return text.replace("MARK", str(mark)).replace("FOLDER", str(folder))

    def tree() -> dict[str, int]:
        return {str(path): path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}

    def attempt(text: str, overrides: dict[str, Any] | None = None) -> None:
        file = tmp_path / "demo.yaml"
        file.write_text(placed(text) + "\n")
        changes = {key: Text(placed(value)) for key, value in (overrides or {}).items()}
        before, files = process_state(), tree()
        witness.seen.clear()
        witness.on = True
        try:
            with pytest.raises(
                ValueError, match=r"demo\.yaml|payload\.yaml|passwd|/dev/zero|overrides|--"
            ):
                load_hparams(file, nested(changes))
        finally:
            witness.on = False
        assert witness.seen == []
        assert "canary" not in sys.modules
        assert process_state() == before
        assert tree() == files

    yield attempt
    sys.modules.pop("canary", None)


def nested(changes: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        found[head] = {rest: value} if rest else value
    return found


@pytest.mark.parametrize("kind", ATTACKS)
def test_an_attack_is_refused_and_nothing_has_happened(
    kind: str, refused: Callable[..., None]
) -> None:
    for attack in ATTACKS[kind]:
        refused(attack)


@pytest.mark.parametrize(("key", "value"), OVERRIDES)
def test_an_attack_from_the_command_line_is_refused_too(
    key: str, value: str, refused: Callable[..., None]
) -> None:
    net = "net: !new:torch.nn.Linear {in_features: 1, out_features: 1}"
    refused(f"x: null\ny: (1, 2)\n{net}\nloader: {{num_workers: 0}}", {key: value})


def test_the_number_of_attacks() -> None:
    assert len(ATTACKS) >= 15
    assert min(map(len, ATTACKS.values())) >= 4
    every = [attack for kind in ATTACKS.values() for attack in kind]
    assert len(every) == len(set(every)) >= 150


def test_the_witness_sees_what_it_is_there_for(witness: Witness, tmp_path: Path) -> None:
    witness.seen.clear()
    witness.on = True
    os.system("true")
    (tmp_path / "a").write_text("")
    witness.on = False
    assert len(witness.seen) == 2
