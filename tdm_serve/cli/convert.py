"""`tdm-serve convert`: a checkpoint as a plain diffusers folder, or an adapter as one file, for stock diffusers.

Which of both is told by `--base`: an adapter is always one of a base, and a checkpoint never takes the option.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tdm_serve.cli.options import finite_number, whole_number

EPILOG = """\
two uses:
  tdm-serve convert MODEL -o FOLDER
      a checkpoint, its adapters fused, as a folder that stock pipelines load
  tdm-serve convert ADAPTER --base MODEL -o FILE.safetensors
      a LoRA of any format that is read, as a file for stock diffusers' load_lora_weights

the published TDM-R1 adapter:
  tdm-serve convert tdmr1_zimage_ema.ckpt --base Z-Image-Turbo/ --rank 32 --alpha 64 -o tdm-r1.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What, and where to; the second group is for adapters."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="MODEL|ADAPTER", help="an id (see `tdm-serve models`), a folder, or a LoRA")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FOLDER|FILE", help="a new or empty folder; or a file"
    )
    group = parser.add_argument_group("for an adapter")
    group.add_argument("--base", metavar="ID|FOLDER", help="the base that the adapter is for")
    group.add_argument(
        "--adapter-format", default="auto", metavar="FORMAT", help="auto, diffusers, peft, kohya or ema-list"
    )
    group.add_argument("--rank", type=whole_number(1), metavar="R", help="checked against the file")
    group.add_argument("--alpha", type=finite_number, metavar="ALPHA", help="where the file does not say it")
    group.add_argument(
        "--targets", metavar="NAME,...", help="the modules of an unnamed list (default: those of the published files)"
    )
    group.add_argument("--scale", type=finite_number, default=1.0, metavar="FACTOR", help="makes it weaker or stronger")
    group.add_argument(
        "--fold-alpha", action="store_true", help="multiply B by alpha / rank, for loaders that read no metadata"
    )


def run(args: argparse.Namespace) -> int:
    """Prints what was written."""
    from tdm_serve.convert import convert, convert_adapter, usage
    from tdm_serve.errors import ConfigError
    from tdm_serve.models.lora import Stated

    stated = Stated(args.rank, args.alpha, tuple((args.targets or "").split(",")) if args.targets else ())
    if args.base is not None:
        path, format_name = Path(args.model), args.adapter_format
        print(
            convert_adapter(path, args.base, args.output, format_name, stated, args.scale, fold_alpha=args.fold_alpha)
        )
        return 0
    if stated != Stated() or args.adapter_format != "auto" or args.scale != 1.0 or args.fold_alpha:
        raise ConfigError("options for an adapter were given without --base; name the base that the adapter is for")
    if Path(args.model).is_file():
        raise ConfigError(f"{args.model} is a file; to convert an adapter, name the base that it is for with --base")
    print(folder := convert(args.model, args.output))
    print(f"the same pictures: {usage(folder)}", file=sys.stderr)
    return 0
