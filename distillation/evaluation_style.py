"""How the page of an evaluation looks, in light and dark, on a wide screen, a narrow one and paper."""

STYLE = """
:root { --ink: #1c1c1e; --quiet: #6e6e73; --line: #d9d9de; --paper: #ffffff; --panel: #f5f5f7;
  --student: #0060c0; --promise: #b3261e; --best: #1b7f3b; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf0; --quiet: #a0a0a8; --line: #3a3a40; --paper: #141416; --panel: #1e1e22;
    --student: #6cb4ff; --promise: #ff8a80; --best: #6fd08c; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h1 span { color: var(--quiet); font-weight: 400; }
header p { margin: .2rem 0 1rem; color: var(--quiet); }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p, li { max-width: 48rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.25rem; margin: 0; padding: 1rem;
  background: var(--panel); border-radius: .5rem; }
dt { color: var(--quiet); }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 2rem; }
figure { margin: 1rem 0 0; min-width: 0; }
figure svg { display: block; width: 100%; max-width: 38rem; height: auto; }
figcaption { color: var(--quiet); font-size: .9rem; max-width: 38rem; }
summary { cursor: pointer; margin-top: .35rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody th, th:first-child { text-align: left; font-weight: 400; min-width: 9rem; }
td { white-space: nowrap; }
thead th { font-weight: 600; color: var(--quiet); font-size: .9rem; }
@media (max-width: 40rem) {
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .6rem; }
}
@media print { .scroll { overflow: visible; } figure, tr { break-inside: avoid; } }
"""
