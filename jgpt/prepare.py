"""Turn text into token files: the data step of training, alone.

    python -m jgpt.prepare --config configs/quickstart.py --config.data.text_glob='texts/**/*.txt'

Training does the same when the token directory is missing or out of date.
"""

from jgpt.cli.flags import define_config, load_config
from jgpt.cli.run import run
from jgpt.config.check import check
from jgpt.config.files import user_path

PREVIEW_TOKENS = 200


def main() -> None:
    """Prepare the token directory that the config names, and say what is in it."""
    # Here, as all that loads JAX: --help must not wait for it.
    from jgpt.cli.terminal import write
    from jgpt.data.token_directory import token_directory
    from jgpt.data.write_tokens import prepare
    from jgpt.loading.adopt import adopt_source

    config = load_config()
    check(config)
    config, _ = adopt_source(config, user_path(config.out_dir).absolute())
    data = prepare(config)
    meta = data.meta
    n_tokens, n_bytes = len(data.train) + len(data.val), meta["train_bytes"] + meta["val_bytes"]
    print(f"token directory   {token_directory(config)}")
    if data.is_chat:
        n_targets = meta["train_targets"] + meta["val_targets"]
        print(f"conversations     {meta['n_documents']:,} ({n_bytes / 1e6:.1f} MB of answers)")
        print(f"learned           {n_targets:,} tokens, {n_targets / n_tokens:.0%} of all")
    else:
        print(f"documents         {meta['n_documents']:,} ({n_bytes / 1e6:.1f} MB of text)")
        print(f"bytes per token   {n_bytes / n_tokens:.2f}")
    print(f"tokens            {len(data.train):,} train, {len(data.val):,} validation (split by {meta['split']})")
    print(f"vocabulary        {data.tokenizer.vocab_size:,} ids ({meta['tokenizer_kind']}), stored as {meta['dtype']}")
    print("begins with")
    for line in data.tokenizer.decode(data.ids(data.train[:PREVIEW_TOKENS])).splitlines()[:3]:
        write(f"    {line[:100]}\n")


if __name__ == "__main__":
    define_config()
    run(main, __doc__)
