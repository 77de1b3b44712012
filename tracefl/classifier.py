"""A classifier: what goes in, what comes out, and how it is run so that neither is disturbed."""

import copy
import math
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partialmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tracefl.errors import TraceFLError, require
from tracefl.states import is_continuous

Batch = Mapping[str, Any] | Tensor  # N inputs: Tensor [N, ...], or the model's keyword arguments
OUTPUTS = ("logit", "log_odds")  # what can be explained
_LOCK = threading.RLock()  # flags of tensors and settings of torch are everybody's
_REGISTER_HOOK = Tensor.register_hook  # which `exact` puts out of action for the model


def batch_size(inputs: Batch) -> int:
    """N, the length of every tensor.

    Raises:
        TraceFLError: the inputs are something else, or of several lengths, or none.
    """
    kind = type(inputs).__name__
    require(isinstance(inputs, Mapping | Tensor), f"inputs must be a Tensor or a dict of Tensors, got a {kind}")
    tensors = [t for t in (inputs.values() if isinstance(inputs, Mapping) else [inputs]) if isinstance(t, Tensor)]
    sizes = {len(t) if t.ndim else 0 for t in tensors}
    bag = isinstance(inputs, Mapping) and inputs.get("offsets") is not None and all(t.ndim == 1 for t in tensors)
    put = "inputs must have an axis of N, which texts put end to end with offsets lack: pad them to [N, T], give the "
    require(not bag, put + "EmbeddingBag a padding_idx, and pass no offsets")
    require(len(sizes) == 1 and sizes != {0}, f"inputs must be tensors of one length, at least 1, got {sorted(sizes)}")
    return sizes.pop()


def take(inputs: Batch, some: slice | list[int]) -> Batch:
    """A copy of some of the inputs, for the model may overwrite it; what is no tensor stays."""
    if isinstance(inputs, Mapping):
        return {name: value[some].clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    return inputs[some].clone()


def output_of(model: nn.Module, inputs: Batch) -> Tensor:
    """Logits [N, classes] of a model that returns them or has them as `.logits`; or one, [N, 1].

    Raises:
        TraceFLError: the output is something else.
    """
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    logits, N = getattr(output, "logits", output), batch_size(inputs)
    if isinstance(logits, Tensor) and logits.shape in ((N,), () if N == 1 else (N,)):
        logits = logits.reshape(N, 1)
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
    must = f"the model's output must be logits [{N}, classes], a row for each input, or have them as .logits"
    fits = isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == N and logits.shape[1] > 0
    require(fits, f"{must}, got {found}: pass a classifier, and inputs whose first axis is N")
    require(logits.is_floating_point(), f"{must}, got {logits.dtype}: pass a model with real logits")
    return logits


def logits_of(model: nn.Module, inputs: Batch) -> Tensor:
    """Logits [N, classes], at least two: the one logit z of a binary model stands for (0, z).

    Raises:
        TraceFLError: the output is something else.
    """
    return of_two_classes(output_of(model, inputs))


def of_two_classes(logits: Tensor) -> Tensor:
    """Logits [N, classes] as they are; one logit z [N, 1] as (0, z).

    Example:
        >>> of_two_classes(torch.tensor([[3.0]])).tolist()
        [[0.0, 3.0]]
    """
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


def log_odds(logits: Tensor, targets: Tensor) -> Tensor:
    """[N] the target's logit minus the log-sum-exp of the others.

    Args:
        logits: [N, classes].
        targets: int64 [N].
    """
    others = logits.scatter(1, targets[:, None], -math.inf).logsumexp(1)
    return logits.gather(1, targets[:, None])[:, 0] - others


def explained(logits: Tensor, targets: Tensor | None, output: str) -> tuple[Tensor, Tensor]:
    """What is explained: y [N], the "logit" or "log_odds" of the targets; and the targets [N].

    Args:
        logits: [N, classes]; half-precision counts as float32. Of one logit [N, 1], whose class 0
            has none of its own, the log-odds are explained in any case: z for class 1, -z for 0.
        targets: int64 [N]; None: the predicted classes.

    Raises:
        TraceFLError: a target is no class of the model, or the logits are probabilities where they
            must not be.
    """
    single, step = logits.shape[1] == 1, _last_step(logits)
    output = "log_odds" if single else output
    fits = step not in ("Sigmoid", "Softmax") or output == "logit"
    require(fits, f"the model's output must be logits, got probabilities: leave its last step out, the {step.lower()}")
    logits = of_two_classes(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    targets = logits.argmax(1) if targets is None else targets.to(logits.device)
    for target in targets[(targets < 0) | (targets >= logits.shape[1])].tolist():
        raise TraceFLError(f"targets must be 0 to {logits.shape[1] - 1}, got {target}")
    return log_odds(logits, targets) if output == "log_odds" else logits.gather(1, targets[:, None])[:, 0], targets


def _last_step(logits: Tensor) -> str:
    """What computed the logits, as autograd calls it, such as "Sigmoid"; changes of shape aside."""
    node = logits.grad_fn
    while node is not None and node.name().startswith(("View", "Squeeze", "Unsqueeze", "Reshape", "ToCopy")):
        node = node.next_functions[0][0]
    return "" if node is None else node.name().removesuffix("Backward0")


def full_precision(model: nn.Module, inputs: Batch) -> tuple[nn.Module, Batch]:
    """The model, as a float32 copy if it is in half precision, and the inputs as it takes them.

    Raises:
        TraceFLError: the model has no tensors, or lies on a device without float64.
    """
    tensors = [t for t in model.state_dict().values() if isinstance(t, Tensor)]
    require(tensors, "the model has no parameters to trace")
    device, half = tensors[0].device, (torch.float16, torch.bfloat16)
    require(device.type != "mps", "Apple's MPS has no float64, in which contributions add up: pass model.cpu()")
    if any(t.dtype in half for t in tensors):
        model = copied(model).float()

    def full(value: Any) -> Any:
        """Detached: gradients end at the model's tensors."""
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(device, torch.float32 if value.dtype in half else value.dtype)

    return model, {name: full(v) for name, v in inputs.items()} if isinstance(inputs, Mapping) else full(inputs)


def kept_bytes(model: nn.Module, run: Callable[[], Any], further: Callable[[Any], list[Tensor]]) -> tuple[Any, int]:
    """Of a forward pass the result, and the bytes that are kept for its backward pass.

    Args:
        model: what it owns is not counted.
        run: does the pass.
        further: of the pass's result the tensors that are kept beside what autograd keeps.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor.detach()  # or an output that its own node keeps would keep that node

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    for tensor in further(result):
        keep(tensor)
    return result, sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)


def uses_batch_statistics(model: nn.Module) -> bool:
    """Whether inputs of a batch see each other in a BatchNorm without running statistics."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None for m in model.modules())


def register_hook(tensor: Tensor, hook: Callable[[Tensor], object]) -> Any:
    """`Tensor.register_hook`, also while a model runs exactly."""
    with torch._C.DisableTorchFunction():
        return _REGISTER_HOOK(tensor, hook)


def _hook_elsewhere(tensor: Tensor, thread: int, hook: Any) -> Any:
    """`Tensor.register_hook`, but not for a model that sets hooks while it is explained."""
    return RemovableHandle(OrderedDict()) if threading.get_ident() == thread else register_hook(tensor, hook)


def copied(model: nn.Module) -> nn.Module:
    """A copy of a model, also of one that keeps what it computed last, as pruned ones do."""
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in kept if value.grad_fn is not None})


@contextmanager
def whole_float32() -> Iterator[None]:
    """On a GPU, float32 with all its bits: TF32, which torch takes for convolutions, has 11."""
    cudnn: Any = torch.backends.cudnn
    cuda = torch.backends.cuda
    named: list[tuple[Any, str, Any, Any]]
    try:
        named = [(of, "allow_tf32", of.allow_tf32, False) for of in (cudnn, cuda.matmul)]
    except RuntimeError:  # the user has set the newer names, after which torch refuses to read the older ones
        named = [(of, "fp32_precision", of.fp32_precision, "ieee") for of in (cudnn.conv, cudnn.rnn, cuda.matmul)]
    with ExitStack() as undo:
        for of, name, was, value in named:
            undo.callback(setattr, of, name, was)
            setattr(of, name, value)
        yield


@contextmanager
def exact(model: nn.Module, set_hooks: Callable[[], Sequence[RemovableHandle]] = tuple) -> Iterator[None]:
    """Run a model as it is written: in eval mode, no autocast, nothing fused or compiled.

    What is fused or compiled skips hooks. None of the model's tensors wants a gradient unless told
    to within, and hooks of the user's cannot change one. All is as it was on exit, without the
    hooks whose handles `set_hooks` returns. Threads wait for one another.
    """
    with _LOCK, ExitStack() as undo:
        for module in [module for module in model.modules() if module.training]:
            undo.callback(setattr, module, "training", True)
            module.training = False
        for tensor in {id(t): t for t in (*model.parameters(), *model.buffers()) if is_continuous(t)}.values():
            undo.callback(tensor.requires_grad_, tensor.requires_grad)
            tensor.requires_grad_(False)
            if tensor._backward_hooks:
                undo.callback(setattr, tensor, "_backward_hooks", tensor._backward_hooks)
                tensor._backward_hooks = None
        found: list[Any] = [nn.modules.module._global_backward_hooks, nn.modules.module._global_backward_pre_hooks]
        for module in model.modules():
            found += [module._backward_hooks, module._backward_pre_hooks]
        for hooks in [hooks for hooks in found if hooks]:
            undo.callback(hooks.update, dict(hooks))
            hooks.clear()
        undo.callback(setattr, Tensor, "register_hook", Tensor.register_hook)
        Tensor.register_hook = partialmethod(_hook_elsewhere, threading.get_ident())  # type: ignore[method-assign,assignment]
        undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        undo.enter_context(whole_float32())
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):  # cuDNN's has no gradient in eval mode
            undo.enter_context(torch.backends.cudnn.flags(enabled=False))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and to load it takes seconds
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        for handle in set_hooks():
            undo.callback(handle.remove)
        device = next((t.device.type for t in (*model.parameters(), *model.buffers())), "cpu")
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
            yield
