"""A shrunk model whose linear layers run as GPU kernels for the options of its plan, under torch.

`with_placeholders` keeps the float weights and marks the layers to replace. After the model was moved to its
device and precision, `deploy_kernels` replaces each marked layer by the kernel that
`export.backends.torch_kernels` has for its option.
"""

import copy
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from compress.core.fakequant import Quantized
from compress.errors import CompressError
from compress.export.backends import torch_kernels
from compress.ir import Option, Site
from compress.sites.modeling import owner
from compress.sites.prune import Removal, readers


class KernelPlaceholder(nn.Linear):
    """A linear layer that `deploy_kernels` will replace; until then a plain layer with these weights."""

    def __init__(
        self, layer: nn.Linear, option: Option, factors: tuple[Tensor, Tensor] | None, codes: Quantized | None
    ) -> None:
        """Share the parameters of `layer`; its weight equals that of `factors` or `codes`."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.option, self.codes, self.factors = option, codes, factors

    def product(self) -> nn.Module:
        """The kernel module for the option, on the device of the weight.

        Raises:
            CompressError: the device has no such kernel, or the weight does not fit it.
        """
        weights = self.factors if self.codes is None else self.codes
        return torch_kernels.required_kernel(self.option.form).deploy(weights, self)


def with_placeholders(model: nn.Module, sites: Iterable[Site], removals: Mapping[str, Removal]) -> nn.Module:
    """A copy of a shrunk model with a placeholder for every layer that gets a kernel.

    Args:
        model: shrunk by the same removals.
        sites: those of the original model.
        removals: by site name; dense ones change nothing.
    """
    found = copy.deepcopy(model)
    for site in sites:
        removal = removals.get(site.name)
        if removal is None or removal.form == "dense" or not len(removal.kept):
            continue
        for name in (site.writer, *readers(site)):
            layer = found.get_submodule(owner(name))
            if not isinstance(layer, nn.Linear):
                raise CompressError(
                    f"{name} belongs to a {type(layer).__name__}; torch runs {removal.form} only in an "
                    "nn.Linear"
                )
            parts = removal.factors.get(name), removal.codes.get(name)
            found.set_submodule(owner(name), KernelPlaceholder(layer, Option.of(removal.form, None), *parts))
    return found


def deploy_kernels(model: nn.Module) -> nn.Module:
    """Replace every placeholder by its kernel, in place; the same model.

    Args:
        model: on its device and in its precision.

    Raises:
        CompressError: the device has no kernel for an option.
    """
    waiting = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, KernelPlaceholder)]
    for name, layer in waiting:
        model.set_submodule(name, layer.product())
    return model
