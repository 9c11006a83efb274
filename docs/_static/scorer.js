/* How the search orders what it finds; Sphinx puts this file into its search script. The figures are Sphinx's own. */
var Scorer = {
  score: ([page, title, _anchor, _description, score, _file, kind]) => {
    const asked = (new URLSearchParams(location.search).get("q") ?? "").trim().toLowerCase();
    /* First the page that `searched` in conf.py names, then a section or a page of that very name. */
    if (kind === "index") return score === 100 ? 300 : score;
    if (title.split(" > ").pop().toLowerCase() === asked) return 200 + score;
    /* These name everything, and would come first by the alphabet. */
    if (kind === "text" && ["api", "changelog", "contributing", "releasing"].includes(page)) return score - 4;
    return score;
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
