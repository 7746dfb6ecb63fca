"""Tables of other toolkits' run options and of their counterparts here.

`trainer.options.translate` applies them. `RENAMED`, `IGNORED` and `REFUSED` have SpeechBrain's
options; they are read from `run_opts`, from the command line, and from the keys of a YAML.
"""

from __future__ import annotations

from typing import Any

# Name: our option, their default, and our values by theirs where they differ. UNSET leaves the
# option as it is.
UNSET = object()
RENAMED: dict[str, tuple[str, Any, dict[Any, Any]]] = {
    "auto_mix_prec": ("precision", False, {True: "fp16", False: UNSET}),
    "bfloat16_mix_prec": ("precision", False, {True: "bf16", False: UNSET}),
    "ckpt_interval_minutes": ("checkpoint_every_minutes", 0, {0: None, -1: None}),
    "ckpt_interval_steps": ("checkpoint_every_steps", 0, {0: None, -1: None}),
    "compile_module_keys": ("compile_modules", None, {}),
    "noprogressbar": ("progressbar", False, {True: False, False: True}),
}

# Name: their default, and the reason why it is not needed here.
IGNORED: dict[str, tuple[Any, str]] = {
    "compile_using_dynamic_shape_tracing": (False, "torch.compile detects dynamic shapes itself"),
    "compile_using_fullgraph": (False, "graphs may break; nothing but speed depends on it"),
    "data_parallel_count": (-1, "torchrun --nproc_per_node sets the number of processes"),
    "distributed_backend": ("nccl", "it follows from the device: nccl on GPUs, gloo on CPUs"),
    "distributed_launch": (False, "processes that torchrun starts find each other"),
    "find_unused_parameters": (False, "parameters without gradients need no option"),
    "jit": (False, "modules are not scripted; --compile compiles them by torch.compile"),
    "jit_module_keys": (None, "modules are not scripted; --compile_modules names those to compile"),
    "local_rank": (None, "torchrun tells each process its rank"),
    "log_config": (None, "messages go to the terminal and to train.log in the run folder"),
    "tqdm_barcolor": ({"train": "GREEN", "valid": "MAGENTA", "test": "CYAN"}, "bars are plain"),
    "tqdm_colored_bar": (False, "progress bars are plain"),
}

# Name: their default, and what to do instead. Ignoring these would change the run.
REFUSED: dict[str, tuple[Any, str]] = {
    "data_parallel_backend": (
        False, "start one process for each GPU: torchrun --standalone --nproc_per_node=2 train.py …"
    ),
    "debug_persistently": (
        False, "a debug run keeps nothing; --optimizer_step_limit=2 without --debug is a short run "
        "that does"
    ),
    "remove_vector_weight_decay": (
        False, "give vectors no weight decay by their names, as in param_groups: "
        '{"*.bias|*norm*": {weight_decay: 0}}'
    ),
}  # fmt: skip

DEFAULTS = {
    **{name: default for name, (_, default, _) in RENAMED.items()},
    **{name: default for name, (default, _) in (IGNORED | REFUSED).items()},
}
NAMES = {*DEFAULTS, "overridden_args", "param_file"}  # The last two are internal.
FLAGS = {name for name, default in DEFAULTS.items() if default is False}

# Names in Lightning, Hugging Face's Trainer and elsewhere: a hint, since a recipe may have keys of
# its own with these names.
SIMILAR = {
    name: option
    for option, names in {
        "checkpoint_every_steps": "save_steps",
        "compile": "torch_compile",
        "debug": "fast_dev_run",
        "device": "accelerator",
        "grad_accumulation_factor": "accumulate_grad_batches gradient_accumulation_steps",
        "log_interval": "log_every_n_steps logging_steps",
        "max_grad_norm": "grad_clip gradient_clip_val gradient_clipping",
        "max_hours": "max_time",
        "optimizer_step_limit": "max_steps",
        "output_folder": "default_root_dir output_dir",
        "overwrite": "overwrite_output_dir",
        "precision": "amp bf16 fp16 mixed_precision",
        "progressbar": "disable_tqdm enable_progress_bar",
    }.items()
    for name in names.split()
}
