#!/usr/bin/env bash
# cmake --install to a folder of its own; a program built against it by pkg-config alone generates as hybridgen does.
#   test_install.sh BUILD SOURCE CC SANITIZERS
set -euo pipefail
build=$1 source_dir=$2 cc=$3 sanitize=$4
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() { echo "$*" >&2; exit 1; }

cmake --install "$build" --prefix "$work/first" >"$work/log"
mv "$work/first" "$work/moved" # nothing in it may hold the place that it was installed to
cd "$work"
for program in hybridtrain hybriddata hybridgen hybrideval hybridserve hybridconvert hybridbench; do
    moved/bin/$program --help | grep -q "^Usage: .*$program" || fail "$program --help does not say how to use it"
    moved/bin/$program --version | grep -q "^$program [0-9]" || fail "$program --version prints no version"
done
cat >use.c <<'END'
#include <stdio.h>
#include "inference/session.h"
int main(int argc, char **argv)
{
    struct ht_session s;
    const struct ht_session_options o = { .path = argv[argc - 1], .weights = "fp32" };
    static float logits[1 << 16];
    int32_t id = 5;
    enum ht_status st = ht_session_open(&s, &o);
    for (int i = 0; i < 9 && st == HT_OK; i++) {
        if (i) printf("%d%c", id, i < 8 ? ' ' : '\n');
        st = ht_decoder_extend(s.decoder, s.state, &id, 1, logits);
        id = 0;
        for (int32_t k = 1; k < (int32_t)s.l.model->cfg.vocab_size; k++) id = logits[k] > logits[id] ? k : id;
    }
    if (st) fprintf(stderr, "%s\n", ht_error_message());
    ht_session_close(&s);
    return ht_exit_code(st);
}
END
export PKG_CONFIG_PATH=$work/moved/$(cd moved && find . -name pkgconfig -type d)
read -ra flags < <(pkg-config --cflags --libs hybridtrain)
"$cc" ${sanitize:+-fsanitize=$sanitize} use.c "${flags[@]}" -o use
model=$source_dir/tests/golden/hf/bamba
./use "$model" >ours
moved/bin/hybridgen --model "$model" --ids 5 --print-ids --fp32 --temperature 0 --n-predict 8 --ignore-eos | tr -s '\n, ' ' ' | sed 's/ $//' >theirs
[ "$(cat ours)" = "$(cat theirs)" ] || fail "ids $(cat ours); hybridgen gives $(cat theirs)"
moved/bin/hybridtrain --plan moved/share/hybridtrain/recipes/bamba130m.cfg >plan || fail "installed recipes cannot be planned"
grep -q "parameters" plan || fail "no plan: $(cat plan)"
