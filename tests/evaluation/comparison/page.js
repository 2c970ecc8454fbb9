// The script of a comparison's page in a document that has just enough: `node comparison_page.js PAGE` prints what it did as JSON.
"use strict";
const page = require("fs").readFileSync(process.argv[2], "utf8");
const [, data] = page.match(/<script type="application\/json" id="data">([^]*?)<\/script>/);
const [, script] = page.match(/<script>([^]*?)<\/script>/);
const elements = {}, frames = new Map();
let frame = 0, made = [];

function node() {
  const own = { children: [], heard: {}, attributes: {}, value: 0, duration: 2, currentTime: 0, classList: { toggle() {} } };
  own.replaceChildren = (...children) => { own.children = children; if (children[0] && children[0].isOption) { own.value = "0"; } };
  own.append = (...children) => own.children.push(...children);
  own.addEventListener = (name, hear) => { own.heard[name] = hear; };
  own.setAttribute = (name, value) => { own.attributes[name] = value; };
  own.getAttribute = name => own.attributes[name];
  own.play = () => { own.plays = true; return Promise.resolve(); };
  own.pause = () => { own.plays = false; };
  return own;
}
global.document = {
  getElementById: name => elements[name] || (elements[name] = name === "data" ? { textContent: data } : node()),
  createElement: name => { const own = node(); if (name === "video") { made.push(own); } return own; },
};
global.Option = function (text, value) { return { isOption: true, text, value }; };
global.requestAnimationFrame = call => { frames.set(++frame, call); return frame; };
global.cancelAnimationFrame = id => frames.delete(id);
document.getElementById("rate").value = "1";
(0, eval)(script);
const get = name => document.getElementById(name);
const tick = () => { const now = [...frames.values()]; frames.clear(); now.forEach(call => call()); };

const told = { sources: made.map(video => video.getAttribute("src")), before: get("missing").textContent, time: get("time").textContent };
get("forth").onclick();
told.later = get("time").textContent;
get("play").onclick();
tick();
["0.5", "2", "0.25"].forEach(rate => { get("rate").value = rate; get("rate").onchange(); tick(); });
told.loops = frames.size;
told.playing = made.map(video => video.plays);
made[0].heard.error();
tick();
told.oneMissing = get("missing").textContent;
told.othersPlay = made.slice(1).map(video => video.plays);
told.loopsThen = frames.size;
made.forEach(video => video.heard.error());
tick();
told.allMissing = get("missing").textContent;
told.button = get("play").textContent;
told.disabled = get("play").disabled;
told.loopsAtEnd = frames.size;
console.log(JSON.stringify(told));
