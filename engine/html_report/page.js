
"use strict";
// Without this script all pictures are shown, one evaluation after the other.
const sheets = document.querySelectorAll(".sheet");
const when = document.getElementById("when");
function show() {
  sheets.forEach((sheet, i) => { sheet.hidden = i !== when.valueAsNumber; });
  const { iteration } = sheets[when.valueAsNumber].dataset;
  document.getElementById("iteration").value = iteration;
  when.setAttribute("aria-valuetext", `after iteration ${iteration}`);
}
if (when) {
  when.addEventListener("input", show);
  document.getElementById("chooser").hidden = false;
  show();
}
