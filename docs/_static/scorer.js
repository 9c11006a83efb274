/* How the search orders what it finds: the figures are Sphinx's own. Sphinx puts this file into its search script. */
var Scorer = {
  /* A section or a page that is called what was asked for comes first. */
  score: ([_docname, title, _anchor, _description, score]) => {
    const asked = (new URLSearchParams(location.search).get("q") ?? "").trim().toLowerCase();
    return title.split(" > ").pop().toLowerCase() === asked ? score + 100 : score;
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
