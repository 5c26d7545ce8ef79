"""The look of a report: one sheet, system fonts, light and dark, screen and paper."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--soft:#5c6570;--rule:#e2e6ea;--wash:#f6f7f9;
--heat:12 74 128;--lost:140 46 0;--gained:0 84 62;--on-strong:#fff;--on-middle:#000;--on-weak:#1b1f24;
--warn:#8a4b00;--warn-wash:#fff3e0;
--c0:#1f6fb4;--c1:#c8500a;--c2:#0a8465;--c3:#9c3f88;--c4:#856800;--c5:#4a5058;--c6:#1f86a0;--c7:#b3263f}
@media (prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e6e9ec;--soft:#9aa4af;--rule:#2b3138;
--wash:#1b1f24;--heat:126 192 250;--lost:255 158 96;--gained:88 214 172;--on-strong:#000;
--on-middle:#000;--on-weak:#fff;--warn:#ffc074;--warn-wash:#33260f;
--c0:#6db3f2;--c1:#ff9a5c;--c2:#4fcfa8;--c3:#e295cf;--c4:#dcbc48;--c5:#c8ccd2;--c6:#7fd6ea;--c7:#ff8095}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
font-variant-numeric:tabular-nums}
main{max-width:68rem;margin:0 auto;padding:clamp(1.5rem,4vw,4rem) clamp(1rem,4vw,3rem) 4rem}
.eyebrow{margin:0 0 .35rem;color:var(--soft);font-size:.8125rem;letter-spacing:.02em}
h1{margin:0;font-size:clamp(1.6rem,1.2rem + 2vw,2.4rem);line-height:1.15;letter-spacing:-.02em;
font-weight:650;text-wrap:balance;overflow-wrap:anywhere}
h2{margin:4.5rem 0 .2rem;font-size:1.5rem;line-height:1.25;letter-spacing:-.01em;font-weight:650;
overflow-wrap:anywhere}
header + section h2{margin-top:2.5rem}
h3{margin:3rem 0 .2rem;font-size:1.0625rem;font-weight:650}
h4{margin:0 0 .4rem;font-size:.875rem;font-weight:600;overflow-wrap:anywhere}
p{margin:.2rem 0 1rem;max-width:46rem;text-wrap:pretty}
.say{color:var(--soft);font-size:.9rem}
.say b{color:var(--ink);font-weight:550}
.after{margin:1.4rem 0 .2rem}
nav ul{display:flex;flex-wrap:wrap;gap:.3rem 1.4rem;margin:1rem 0 0;padding:0;list-style:none}
a{color:inherit;text-decoration-color:var(--soft);text-underline-offset:.2em}
dl.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.9rem 1.5rem;
margin:1.1rem 0 1.8rem;padding:1rem 0;border-block:1px solid var(--rule)}
dl.facts div{min-width:0}
dt{color:var(--soft);font-size:.78rem}
dd{margin:0;font-size:.93rem;overflow-wrap:anywhere}
.warning{display:inline-block;margin:.2rem 0 .6rem;padding:.3rem .7rem;border-radius:.4rem;
background:var(--warn-wash);color:var(--warn);font-size:.875rem}
.scroll{overflow-x:auto;margin:.6rem 0 0;padding-bottom:.3rem}
table{border-collapse:collapse;font-size:.9rem}
table.data{width:100%}
.data th,.data td{padding:.42rem 0 .42rem 1.4rem;text-align:right;border-bottom:1px solid var(--rule);
white-space:nowrap;vertical-align:baseline}
.data thead th{color:var(--soft);font-weight:500;font-size:.8rem;vertical-align:bottom;white-space:normal}
.data tbody th{font-weight:550}
.data .name{padding-left:0;text-align:left;position:sticky;left:0;background:var(--paper)}
.data .text{text-align:left}
.data tbody tr:last-child > *{border-bottom-color:var(--soft)}
.data .lead{font-weight:650}
.data .break{white-space:normal;min-width:9rem;overflow-wrap:anywhere}
.aside{color:var(--soft);font-weight:400;font-size:.82rem}
.legend{display:flex;flex-wrap:wrap;gap:.35rem 1.8rem;margin:.9rem 0 .6rem;padding:0;list-style:none;
font-size:.875rem}
.legend li{display:flex;align-items:center;gap:.5rem}
.legend b{font-weight:500;color:var(--soft)}
.swatch{width:1.9rem;height:.9rem;flex:none}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-size:12px;fill:var(--soft)}
.grid{stroke:var(--rule)}
.line{fill:none;stroke:var(--c);stroke-width:1.9;stroke-linejoin:round;stroke-linecap:round}
.band{fill:var(--c);fill-opacity:.13}
.mark{fill:var(--c);stroke:var(--paper);stroke-width:1}
.narrow{display:none}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}
.c4{--c:var(--c4)}.c5{--c:var(--c5)}.c6{--c:var(--c6)}.c7{--c:var(--c7)}
.maps{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--least)),1fr));
gap:2rem 2.4rem;margin-top:1.2rem}
.maps > div{min-width:0;break-inside:avoid}
.heat{border-collapse:separate;border-spacing:2px;font-size:.75rem}
.heat th{color:var(--soft);font-weight:450;padding:0 .3rem;white-space:nowrap}
.heat tbody th,.heat th:first-child{text-align:left;padding:0 .5rem 0 0;position:sticky;left:0;
background:var(--paper)}
.heat td{min-width:2.1rem;height:1.75rem;padding:0 .2rem;text-align:center;border-radius:3px;
print-color-adjust:exact;-webkit-print-color-adjust:exact}
.heat .mean{padding-left:.7rem;text-align:right;color:var(--soft)}
.accuracy{background:rgb(var(--heat) / var(--o))}
.lost{background:rgb(var(--lost) / var(--o))}
.gained{background:rgb(var(--gained) / var(--o))}
.weak{color:var(--on-weak)}.middle{color:var(--on-middle)}.strong{color:var(--on-strong)}
details{margin:1rem 0;border-bottom:1px solid var(--rule);padding-bottom:.8rem}
summary{cursor:pointer;font-size:.9rem}
summary:hover,a:hover{color:var(--c0)}
:focus-visible{outline:2px solid var(--c0);outline-offset:2px;border-radius:2px}
.runs{margin:1rem 0 0;padding:0;list-style:none}
.runs li{padding:.5rem 0 .8rem;break-inside:avoid}
code{display:block;margin-top:.35rem;padding:.5rem .7rem;border-radius:.4rem;background:var(--wash);
font:.8rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;
overflow-wrap:anywhere}
ol.tasks{columns:20rem auto;column-gap:2rem;padding-left:1.6rem;font-size:.875rem}
ol.tasks li{break-inside:avoid;margin-bottom:.4rem;overflow-wrap:anywhere}
footer{margin-top:4rem;color:var(--soft);font-size:.8rem}
@media (max-width:40rem){.wide{display:none}.narrow{display:block}h2{margin-top:3.5rem}
dl.facts{grid-template-columns:1fr 1fr}.legend{flex-direction:column}
.data th,.data td{padding-left:.9rem}.data .name{padding-left:0}
.data .name .aside{display:block;max-width:8rem;white-space:normal}.data thead th:not(.name){min-width:4rem}
.heat{border-spacing:1px;font-size:.65rem}.heat td{min-width:1.7rem;height:1.6rem;padding:0}
.heat th{padding:0 .1rem}.heat tbody th{padding-right:.3rem;max-width:6rem;white-space:normal}
.heat .mean{padding-left:.3rem}}
@media print{@page{margin:1.6cm}body{font-size:10pt}main{max-width:none;padding:0}
h2,h3{break-after:avoid}section + section{break-before:page}.scroll{overflow:visible}
.data .name{position:static}}
""".strip()
