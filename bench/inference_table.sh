#!/usr/bin/env bash
# inference_table.sh FILE.jsonl: what compare_inference.sh measured, as a Markdown table. Figures are tokens/s, medians; the
# ratio is the median of the ratios of neighbours in time where ours and the peer took turns, else the ratio of the medians. The
# share of bandwidth is what a step has to move over the rate at which the same process read memory by a plain loop.
set -euo pipefail
awk '
function median(list, n,   i, j, t, x) {
    n = split(list, x, " ")
    for (i = 2; i <= n; i++) for (j = i; j > 1 && x[j] + 0 < x[j - 1] + 0; j--) { t = x[j]; x[j] = x[j - 1]; x[j - 1] = t }
    return n ? (x[int((n + 1) / 2)] + x[int(n / 2) + 1]) / 2 : 0
}
function text(key,   s) { if (!match($0, "\"" key "\": \"[^\"]*\"")) return ""; s = substr($0, RSTART, RLENGTH); sub(/^[^:]*: "/, "", s); sub(/"$/, "", s); return s }
function number(key,   s) { if (!match($0, "\"" key "\": [0-9.]+")) return ""; s = substr($0, RSTART, RLENGTH); sub(/^[^:]*: /, "", s); return s }
{
    key = text("model") " | " text("weights") " | " text("kind")
    if (!(key in seen)) { seen[key] = 1; order[++n_keys] = key }
    match($0, /"all": \[[^]]*\]/); all = substr($0, RSTART + 8, RLENGTH - 9); gsub(/,/, " ", all); split(all, v, " ")
    if (text("program") == "hybridtrain") {
        ours[key] = ours[key] " " all; last[key] = v[1]
        if (number("step_GB_per_s") != "") share[key] = share[key] " " number("step_GB_per_s") / number("read_GB_per_s")
        if (number("peak_GB") + 0 > peak[key] + 0) peak[key] = number("peak_GB")
        need[key] = number("weights_GB") + number("state_GB")
    } else {
        peer[key] = peer[key] " " all
        if (split(all, v, " ") == 1) ratio[key] = ratio[key] " " last[key] / all
    }
}
END {
    print "| model | weights | test | ours | llama.cpp | ratio | of read bandwidth | peak GB | weights + state GB |"
    print "|---|---|---|---:|---:|---:|---:|---:|---:|"
    for (i = 1; i <= n_keys; i++) {
        k = order[i]; o = median(ours[k]); p = median(peer[k])
        r = ratio[k] != "" ? median(ratio[k]) : p ? o / p : 0
        printf "| %s | %.1f | %.1f | **%.2fx** | %s | %.2f | %.2f |\n", k, o, p, r, share[k] != "" ? sprintf("%.0f%%", 100 * median(share[k])) : "", peak[k], need[k]
    }
}' "$1"
