#!/usr/bin/env python
"""Publishes a model, or tokens as a dataset with a card, on the Hub.

python scripts/push_to_hub.py --model runs/demo/model --repo-id USER/NAME
python scripts/push_to_hub.py --tokens runs/demo/tokens --repo-id USER/NAME --license cc-by-4.0

Who you are is known by the environment variable HF_TOKEN, or by `hf auth login`. A README.md in the folder goes along
as it is; for tokens without one, the card is made from manifest.json.
"""

import argparse
import sys
from pathlib import Path

from modeling_pose_tokenizer.extraction import TokenFolderError
from modeling_pose_tokenizer.hub import ModelFolderError
from modeling_pose_tokenizer.publishing import PublishError, push_model, push_tokens

TEMPLATE = Path(__file__).parents[1] / "dataset_card.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="DIR", help="checkpoint folder, such as best/ of a training run")
    what.add_argument("--tokens", metavar="DIR", help="folder that extract_tokens.py wrote, all its splits complete")
    parser.add_argument("--repo-id", required=True, metavar="USER/NAME", help="the repository; made if there is none")
    parser.add_argument("--private", action="store_true", help="nobody else can see the repository")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to upload to (default: main)")
    parser.add_argument("--license", metavar="NAME", help="with --tokens: as the Hub names it, such as cc-by-4.0")
    parser.add_argument(
        "--made-by",
        metavar="USER/MODEL",
        help="with --tokens: the model's repository (default: as manifest.json says)",
    )
    args = parser.parse_args()
    if args.model is not None and (args.license or args.made_by):
        parser.error("--license and --made-by go with --tokens; a model's card is the README.md in its folder.")
    where = {"private": args.private, "revision": args.revision}
    try:
        if args.model is not None:
            url = push_model(args.model, args.repo_id, **where)
        else:
            url = push_tokens(args.tokens, args.repo_id, TEMPLATE, license=args.license, model=args.made_by, **where)
    except (ModelFolderError, TokenFolderError, PublishError) as error:
        sys.exit(str(error))
    print(url)


if __name__ == "__main__":
    main()
